"""Write docs/cli.md and docs/api.md from the command line's help and the docstrings. The part of
docs/api.md about HTTP is tools/over_http.md.

python tools/generate_docs.py           write the pages
python tools/generate_docs.py --check   only list outdated pages; exit status 1 if any is
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from coppice import client, errors, model
from coppice.cli.app import app
from coppice.client.joining import Connecting
from coppice.machine.rooms import Deadlines
from coppice.model.guest import Exit, Health
from coppice.model.inspection import Inspection, SnapshotInspection, StandbyReport, VolumeInspection
from coppice.model.kernel import Kernel

_INTERNAL = ("local",)
ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by tools/generate_docs.py: change the source, then run it. -->\n\n"


def cli_page() -> str:
    """Return the page of the command line, from its help."""
    return NOTE + "\n".join(_command(_context(app, "coppice"), "The command line", 1)).rstrip() + "\n"


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, parent=parent, info_name=name, **command.context_settings)


def _command(context: click.Context, title: str, level: int) -> Iterator[str]:
    """Yield a command and, if it is a group, its commands."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"{'#' * level} {title}\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    yield f"**Usage**:\n\n```console\n$ {usage}\n```\n"
    for kind, name in ((click.Argument, "Arguments"), (click.Option, "Options")):
        records = [each.get_help_record(context) for each in command.get_params(context) if isinstance(each, kind)]
        if lines := [f"* `{names}`: {text}" for names, text in filter(None, records)]:
            yield f"**{name}**:\n\n" + "\n".join(lines) + "\n"
    if not isinstance(command, click.Group):
        return
    found = {name: command.get_command(context, name) for name in command.list_commands(context)}
    below = [_context(each, name, context) for name, each in found.items() if each is not None]
    yield "**Commands**:\n\n" + "\n".join(map(_entry, below)) + "\n"
    for each in below:
        yield from _command(each, f"`{each.command_path}`", max(level + 1, 2))


def _entry(context: click.Context) -> str:
    """Return a help fragment as a whole sentence."""
    sentence = re.split(r"(?<=\.)\s", inspect.cleandoc(context.command.help or ""), maxsplit=1)[0]
    return f"* [`{context.info_name}`](#{context.command_path.replace(' ', '-')}): {sentence}"


def api_page() -> str:
    """Return the page of the Python API: hosts, managers, handles, data types, errors."""
    parts = [
        NOTE + "# The Python API\n",
        "Everything here is imported from `coppice`. `AsyncHost` and what it returns are for asyncio. `Host`, `Machine`, `Forks` and "
        "the managers `Images`, `Kernels`, `Volumes` and `Snapshots` are the same without `await`: same names, parameters, results and "
        "errors. Their context managers are used with `with`, their iterators with `for`. [Over HTTP](#over-http) the same operations are "
        "used from any language.\n",
        "`Opening[X]`: `await` it for an `X` that stays, or use `async with` for one that is removed at the end of the block.\n",
        *(part for kind in _API for part in _class(kind)),
        "## `ExecSession`\n",
        "What `open_exec` of a `Machine` yields. That of an `AsyncMachine` is the same with `await` and `async for`.\n",
        _prose(client.ExecSession.__doc__),
        *_methods(client.ExecSession),
        "## `Connecting`\n",
        _prose(Connecting.__doc__),
        *_methods(Connecting),
        "## Data\n",
        _prose((model.__doc__ or "").partition("\n\n")[2]),
        *(part for kind in _data_types() for part in _record(kind)),
        "## Errors\n",
        "Every error has `message`, `hint`, `code`, `exit_code` and `http_status`.\n",
        _errors(),
        (ROOT / "tools/over_http.md").read_text(),
    ]
    return "\n".join(parts).rstrip() + "\n"


_API = (
    client.AsyncHost,
    client.AsyncMachine,
    client.AsyncForks,
    client.AsyncImages,
    client.AsyncKernels,
    client.AsyncVolumes,
    client.AsyncSnapshots,
)


def _class(kind: type) -> Iterator[str]:
    yield f"## `{kind.__name__}` and `{kind.__name__.removeprefix('Async')}`\n"
    yield _prose(kind.__doc__)
    yield from _methods(kind)


def _prose(doc: str | None) -> str:
    """Return a docstring as Markdown: `:raises X: why` as a list, an indented example as code."""
    text = inspect.cleandoc(doc or "")
    text = re.sub(r"^:raises (\w+): ", r"* raises `\1`: ", text, flags=re.MULTILINE)
    text = re.sub(r"^:param (\w+): ", r"* `\1`: ", text, flags=re.MULTILINE)
    code = re.compile(r"^((?:async )?with .*\n(?: +.*(?:\n|\Z))+)", re.MULTILINE)
    return code.sub(lambda found: f"```python\n{found[1].rstrip()}\n```\n", text) + "\n"


def _methods(kind: type) -> Iterator[str]:
    *bases, root, _ = kind.__mro__
    for base in (root, *bases):
        for name, member in vars(base).items():
            getter = member.func if isinstance(member, cached_property) else getattr(member, "fget", None)
            if getter is not None and name not in _INTERNAL:
                yield f"### `{name}`\n"
                yield f"```python\n{name}: {inspect.signature(getter).return_annotation}\n```\n"
                yield _prose(member.__doc__)
            elif inspect.isfunction(member) and (not name.startswith("_") or (name == "__init__" and member.__doc__)):
                shown = kind.__name__ if name == "__init__" else name
                yield f"### `{shown}`\n"
                yield f"```python\n{_signature(member, shown)}\n```\n"
                yield _prose(member.__doc__)


def _signature(function: Any, shown: str) -> str:
    """Return a signature without `self`, with one parameter per line if it is long."""
    entered = function.__globals__["__name__"] == "contextlib"  # a block, not a call
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
    """Return a default as people write it: modes in octal, sizes with their unit."""
    if isinstance(value, model.State):
        return str(value.__class__.__name__) + "." + value.name
    if isinstance(value, int) and name == "mode":
        return f"0o{value:o}"
    if isinstance(value, int) and name.endswith("_bytes") and value % model.MIB == 0:
        return f"{value >> 30} << 30" if value % model.GIB == 0 else f"{value >> 20} << 20"
    return getattr(value, "__name__", None) or repr(value)


def _data_types() -> list[type]:
    ours = [
        kind
        for kind in vars(model).values()
        if isinstance(kind, type) and kind.__module__.startswith(f"{model.__name__}.")
    ]
    return [
        *(kind for kind in ours if kind is not model.Record),
        StandbyReport,
        Inspection,
        SnapshotInspection,
        VolumeInspection,
        Health,
        Exit,
        Kernel,
        Deadlines,
    ]


def _record(kind: type) -> Iterator[str]:
    """Yield a data type with its fields and their comments from the source."""
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
    """Return every generated page."""
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
