"""Write docs/cli.md and docs/api.md from the program itself: the command line's own help, and the docstrings.

python tools/generate_docs.py           write the pages
python tools/generate_docs.py --check   only say which are out of date; exit status 1 if any is
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from coppice import errors, host, model, sync
from coppice.bench.cli import app as bench_app
from coppice.cli.app import app
from coppice.guest.control import Health
from coppice.guest.kernel import Kernel
from coppice.guest.process import Exit
from coppice.instance.rooms import Deadlines

_INTERNAL = ("rooms",)
ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by tools/generate_docs.py: change the source, then run it. -->\n\n"


def cli_page() -> str:
    """The command line, as its own help has it."""
    root, bench = (typer.main.get_command(each) for each in (app, bench_app))
    pages = [
        get_docs_for_click(
            obj=command, ctx=typer.Context(command, **command.context_settings), name=name, title=title, indent=indent
        )
        for command, name, title, indent in (
            (root, "coppice", "The command line", 0),
            (bench, "coppice bench", None, 1),
        )
    ]
    # The root lists `bench` too, without what it imports only when it is run.
    stub = re.compile(r"^## `coppice bench`\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = stub.sub("", pages[0]).rstrip() + "\n\n" + pages[1].rstrip() + "\n"
    for name, command in getattr(root, "commands", {}).items():  # whole sentences, where the help has half of them
        sentence = re.split(r"(?<=\.)\s", command.help or "", maxsplit=1)[0]
        text = re.sub(
            rf"^\* `{name}`: .*$", f"* [`{name}`](#coppice-{name}): {sentence}", text, count=1, flags=re.MULTILINE
        )
    return NOTE + text


def api_page() -> str:
    """The Python API: the hosts, the data types, the errors."""
    parts = [
        NOTE + "# The Python API\n",
        "Everything here is imported from `coppice`, but for `ExecSession`, which `open_exec` makes.\n",
        "## `AsyncHost` and `Host`\n",
        _prose(host.AsyncHost.__doc__),
        "`Host` is the same without `await`: same names, parameters, results and errors. "
        "Its context managers are used with `with`, its iterators with `for`.\n",
        *_methods(host.AsyncHost),
        "## `ExecSession`\n",
        "What `open_exec` of `Host` yields. That of `AsyncHost` is the same with `await` and `async for`.\n",
        _prose(sync.ExecSession.__doc__),
        *_methods(sync.ExecSession),
        "## Data\n",
        _prose((model.__doc__ or "").partition("\n\n")[2]),
        *(part for kind in _data_types() for part in _record(kind)),
        "## Errors\n",
        "Every error has `message`, `hint`, `code`, `exit_code` and `http_status`.\n",
        _errors(),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _prose(doc: str | None) -> str:
    """A docstring as Markdown: `:raises X: why` becomes a list, an indented example a code block."""
    text = inspect.cleandoc(doc or "")
    text = re.sub(r"^:raises (\w+): ", r"* raises `\1`: ", text, flags=re.MULTILINE)
    text = re.sub(r"^:param (\w+): ", r"* `\1`: ", text, flags=re.MULTILINE)
    code = re.compile(r"^((?:async )?with .*\n(?: +.*(?:\n|\Z))+)", re.MULTILINE)
    return code.sub(lambda found: f"```python\n{found[1].rstrip()}\n```\n", text) + "\n"


def _methods(kind: type) -> Iterator[str]:
    *bases, root, _ = kind.__mro__
    for base in (root, *bases):
        for name, member in vars(base).items():
            if isinstance(member, property) and name not in _INTERNAL:
                yield f"### `{name}`\n"
                yield f"```python\n{name}: {inspect.signature(member.fget or _prose).return_annotation}\n```\n"
                yield _prose(member.__doc__)
            elif inspect.isfunction(member) and (not name.startswith("_") or (name == "__init__" and member.__doc__)):
                shown = kind.__name__ if name == "__init__" else name
                yield f"### `{shown}`\n"
                yield f"```python\n{_signature(member, shown)}\n```\n"
                yield _prose(member.__doc__)


def _signature(function: Any, shown: str) -> str:
    """The signature as it is written, without `self`; one parameter in a line where it is long."""
    entered = inspect.unwrap(function) is not function  # made by contextlib: a block, not a call
    function = inspect.unwrap(function)
    signature = inspect.signature(function)
    words: list[str] = []
    starred = False
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            words.append("*")
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.name, parameter.default)}"
        words.append(f"{parameter.name}: {parameter.annotation}{default}")
    result = f" -> {signature.return_annotation}" if shown == function.__name__ else ""
    if entered:
        result = re.sub(r" -> (?:Async)?Iterator\[(.*)\]", r" as \1", result)
    prefix = "async with " if entered else "async " if inspect.iscoroutinefunction(function) else ""
    line = f"{prefix}{shown}({', '.join(words)}){result}"
    if len(line) <= 100:
        return line
    return f"{prefix}{shown}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def _default(name: str, value: object) -> str:
    """A default as people write it: modes in octal, sizes by their unit."""
    if isinstance(value, model.State):
        return str(value.__class__.__name__) + "." + value.name
    if isinstance(value, int) and name == "mode":
        return f"0o{value:o}"
    if isinstance(value, int) and name.endswith("_bytes") and value % model.MIB == 0:
        return f"{value >> 30} << 30" if value % model.GIB == 0 else f"{value >> 20} << 20"
    return getattr(value, "__name__", None) or repr(value)


def _data_types() -> list[type]:
    ours = [kind for kind in vars(model).values() if isinstance(kind, type) and kind.__module__ == model.__name__]
    return [
        *(kind for kind in ours if kind is not model.Record),
        host.Inspection,
        host.SnapshotInspection,
        host.VolumeInspection,
        Health,
        Exit,
        Kernel,
        Deadlines,
    ]


def _record(kind: type) -> Iterator[str]:
    """A data type with its fields and their comments, as the source has them."""
    source = inspect.getsource(kind)
    docstring = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    lines = source.splitlines()[(docstring.end_lineno or 0) :]
    yield f"### `{kind.__name__}`\n"
    yield _prose(kind.__doc__)
    if any(line.strip() for line in lines):
        yield "```python\n" + textwrap.dedent("\n".join(lines)).strip() + "\n```\n"


def _errors() -> str:
    rows = ["| error | code | exit | HTTP | meaning |", "|---|---|---|---|---|"]

    def add(kind: type[errors.CoppiceError], depth: int) -> None:
        meaning = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        indent = "&emsp;" * depth
        rows.append(
            f"| {indent}`{kind.__name__}` | `{kind.code}` | {kind.exit_code} | {kind.http_status} | {meaning} |"
        )
        for child in kind.__subclasses__():
            if child.__module__ == errors.__name__:
                add(child, depth + 1)

    add(errors.CoppiceError, 0)
    return "\n".join(rows) + "\n"


def pages() -> dict[Path, str]:
    """Every generated page, as it should be."""
    return {ROOT / "docs/cli.md": cli_page(), ROOT / "docs/api.md": api_page()}


def main(arguments: list[str]) -> int:
    """Write the pages, or, with --check, compare them."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if "--check" in arguments:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date; run tools/generate_docs.py\n")
        else:
            path.write_text(pages()[path])
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
