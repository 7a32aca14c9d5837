"""Generate the methods of the public API from the request records, and their blocking twins.

python tools/generate_client.py           write src/coppice/client
python tools/generate_client.py --check   only list outdated modules; exit status 1 if any is

A request record in `coppice.requests` lists the parameters of its operation once. Each record
becomes a method of AsyncMachine, AsyncHost or a manager: parameters with their types, defaults and
descriptions, and a body that makes the request. The modules in `client/aio`, generated or not,
become the modules in `client/blocking`: the same methods, each waiting for its asynchronous twin.
"""

from __future__ import annotations

import inspect
import keyword
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
from blocking_twin import blocking_module

from coppice import requests
from coppice.host.opened import OpenedHost
from coppice.model import ForkReport, Instance
from coppice.model.guest import Connection
from coppice.model.inspection import StandbyReport
from coppice.requests import (
    archives,
    automation,
    commands,
    files,
    forks,
    guest,
    host,
    images,
    machines,
    snapshots,
    volumes,
)
from coppice.requests.base import Request, StreamRequest, description_of, extra_of, fields_of, result_of

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "src/coppice/client"
NOTE = "# Written by tools/generate_client.py: change coppice.requests, then run it.\n\n"
_WRITTEN_BY_HAND = ("base", "machine", "host")  # of the asynchronous modules that have a generated twin
_METHODS_OF_HOST = {"get", "stats", "tree"}  # requests about one instance that are methods of the host

Operations = Sequence[type[Request[Any]]]


def _of(*modules: types.ModuleType) -> list[type[Request[Any]]]:
    """Return the requests defined in these modules, in order."""
    known = [getattr(requests, name) for name in requests.__all__]
    return [
        kind
        for module in modules
        for kind in vars(module).values()
        if kind in known
        and kind.__module__ == module.__name__
        and kind.__name__.endswith("Request")
        and kind.has_method
    ]


def _modules() -> dict[str, tuple[str, list[tuple[str, str, str, Operations]]]]:
    """Return by module its docstring and its classes: name, base, docstring, requests."""
    of_machine = [
        kind
        for kind in _of(machines, forks, snapshots, archives, guest, host)
        if "instance" in kind.__struct_fields__ and _name(kind) not in _METHODS_OF_HOST
    ]
    inside = [kind for kind in of_machine if kind.__module__ in (guest.__name__, host.__name__, archives.__name__)]
    life = [kind for kind in of_machine if kind not in inside]
    others = [kind for kind in _of(machines, archives, host) if kind not in of_machine]

    def manager(word: str, *modules: types.ModuleType) -> Operations:
        return [kind for kind in _of(*modules) if _name(kind).startswith(f"{word}_")]

    return {
        "lifecycle": (
            "Operations that change or fork a machine.",
            [("MachineLifecycle", "MachineBase", "The operations that change or fork a machine.", life)],
        ),
        "automation": (
            "What a supervisor does by itself with a machine.",
            [("MachineAutomation", "MachineBase", "Automatic standbys and scheduled snapshots.", _of(automation))],
        ),
        "guest": (
            "Operations inside a machine, and what can be read of it.",
            [("MachineGuest", "MachineBase", "Commands, connections, files, logs and archives of a machine.", inside)],
        ),
        "commands": (
            "The manager of a machine's commands.",
            [
                (
                    "AsyncCommands",
                    "Bound",
                    "The commands of one machine that go on without their client.",
                    manager("command", commands),
                )
            ],
        ),
        "files": (
            "The manager of a machine's files.",
            [("AsyncFiles", "Bound", "The files and directories of one machine.", manager("file", files))],
        ),
        "operations": (
            "Operations of a host, except those of its managers and machines.",
            [("HostOperations", "Bound", "Operations that make and find machines, or concern all of them.", others)],
        ),
        "images": (
            "Managers of images and kernels.",
            [
                ("AsyncImages", "Bound", "The images of a host.", manager("image", images)),
                ("AsyncKernels", "Bound", "The kernels of a host.", manager("kernel", images)),
            ],
        ),
        "managers": (
            "Managers of volumes and snapshots.",
            [
                (
                    "AsyncVolumes",
                    "Bound",
                    "The volumes of a host: disks that outlive machines.",
                    manager("volume", volumes),
                ),
                (
                    "AsyncSnapshots",
                    "Bound",
                    "The snapshots of a host. `vm.snapshot` makes one.",
                    manager("snapshot", snapshots, forks),
                ),
            ],
        ),
    }


def _name(kind: type[Request[Any]]) -> str:
    return str(kind.__struct_config__.tag)


class Parameter(msgspec.Struct):
    """A parameter of a method, and the value that it gives the request."""

    name: str
    annotation: str
    default: str | None
    value: str
    description: str


def _parameters(kind: type[Request[Any]], fixed: Mapping[str, str]) -> list[Parameter]:
    """Return the parameters of an operation's method: the request's fields except fixed ones."""
    found: list[Parameter] = []
    defaults = {field.name: field for field in msgspec.structs.fields(kind)}
    for name, annotation in fields_of(kind).items():
        if name in fixed:
            continue
        shown, value = _spelled(annotation), name
        default = _default(name, defaults[name])
        if extra_of(annotation).get("path"):
            shown = shown.replace("str", "Path | str")
            value = f"text_of({name})" if default is None else f"None if {name} is None else text_of({name})"
        elif (thing := _things(kind, name)) is not None:
            shown, value = f"{thing} | str", f"key_of({name})"
        elif default == "{}":
            shown, default, value = f"{shown} | None", "None", f"{{}} if {name} is None else {name}"
        found.append(Parameter(name, shown, default, value, description_of(annotation)))
    return found


def _things(kind: type[Request[Any]], name: str) -> str | None:
    """Return the record that a manager's method accepts in place of a name."""
    word = _name(kind).partition("_")[0]
    return word.capitalize() if name == word and word in ("image", "kernel", "volume", "snapshot") else None


def _default(name: str, field: Any) -> str | None:
    if field.required:
        return None
    if field.default is msgspec.NODEFAULT:
        return repr(field.default_factory())
    value = field.default
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{type(value).__name__}.{value.name}" if hasattr(value, "name") else repr(value)
    if name == "mode":
        return f"0o{value:o}"
    if name.endswith("_bytes") and value % (1 << 20) == 0:
        return f"{value >> 30} << 30" if value % (1 << 30) == 0 else f"{value >> 20} << 20"
    return repr(value)


def _spelled(annotation: Any) -> str:
    """Return a type as source text."""
    if hasattr(annotation, "__metadata__"):
        return _spelled(annotation.__origin__)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join(_spelled(each) for each in args)
    if origin is Literal:
        return f"Literal[{', '.join(f'{each!r}' for each in args)}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_spelled(each) for each in args)}]"
    return "None" if annotation is type(None) else str(annotation.__name__)


def _method(kind: type[Request[Any]], *, fixed: Mapping[str, str], prefix: str) -> str:
    """Return the method of an operation. `fixed` are fields that are no parameters, with their values."""
    name = _name(kind).removeprefix(prefix)
    return _written(kind, f"{name}_" if keyword.iskeyword(name) else name, fixed, _parameters(kind, fixed))


def _one(kind: type[Request[Any]], *, of_machine: bool) -> str:
    """Return `fork_one`, the method for a single fork."""
    fixed = {"count": "1", "atomic": "True", "payloads": "()"} | ({"instance": "self.id"} if of_machine else {})
    parameters = _parameters(kind, {**fixed, "names": ""})
    chosen = Parameter("name", "str | None", "None", "", "Name of the fork. Default: generated.")
    names = Parameter("names", "", None, "() if name is None else (name,)", "")
    required = [each for each in parameters if each.default is None]
    optional = [each for each in parameters if each.default is not None]
    text = _written(kind, "fork_one", fixed, [*required, chosen, *optional], extra=[names])
    first, _, rest = text.partition('"""')
    _, _, rest = rest.partition(":param")
    doc = (
        "Grow one fork, and return its machine. Raise the fork's error if it fails.\n\n"
        "        Parameters and errors are those of `fork`.\n\n        :param"
    )
    return f'{first}"""{doc}{rest}'


def _written(
    kind: type[Request[Any]],
    name: str,
    fixed: Mapping[str, str],
    parameters: list[Parameter],
    extra: Sequence[Parameter] = (),
) -> str:
    positional = [each for each in parameters if each.default is None or each.name in kind.positional]
    positional = sorted(positional, key=lambda each: each.default is not None)
    if name == "fork_one":
        positional = [each for each in positional if each.default is None]
    named = [each for each in parameters if each not in positional]
    words = ["self", *map(_declared, positional)]
    if named or kind.reports_progress:
        words += ["*", *map(_declared, named)]
    progress = ""
    if kind.reports_progress:
        words.append("progress: ProgressSink = no_progress")
        progress = ", progress"
    values = {**fixed, **{each.name: each.value for each in (*parameters, *extra) if each.value}}
    request = f"{kind.__name__}({', '.join(f'{key}={value}' for key, value in values.items())})"
    head, result, body = _result(kind, name, request, progress)
    described = positional + named
    if kind.reports_progress:
        described = [*described, Parameter("progress", "", "", "", "Called with each step of the work.")]
    return (
        f"    {head} {name}({', '.join(words)}) -> {result}:\n"
        f'        """{_documented(kind, described)}"""\n'
        f"{textwrap.indent(body, ' ' * 8)}\n"
    )


def _declared(parameter: Parameter) -> str:
    default = "" if parameter.default is None else f" = {parameter.default}"
    return f"{parameter.name}: {parameter.annotation}{default}"


def _result(kind: type[Request[Any]], name: str, request: str, progress: str) -> tuple[str, str, str]:
    """Return the first words of a method, its result, and its body."""
    result = result_of(kind)
    call = f"await self._backend.call({request}{progress})"
    if issubclass(kind, StreamRequest):
        spelled = _spelled(result)
        if result is Connection:
            return "def", "Connecting", f"return self._connected({request})"
        if get_origin(result) is None:
            return "def", f"AbstractAsyncContextManager[{spelled}]", f"return self._backend.stream({request})"
        body = f"async with self._backend.stream({request}) as items:\n    async for item in items:\n        yield item"
        return "async def", spelled, body
    if name == "fork_one":
        return "def", "Opening[AsyncMachine]", f"return self._grown_one({request}{progress})"
    if result is ForkReport:
        return "def", "Opening[AsyncForks]", f"return self._grown({request}{progress})"
    if name == "run":
        return "def", "Opening[AsyncMachine]", f"return self._made({request}{progress})"
    if result is Instance:
        if "self.id" in request:
            return "async def", "Self", f"return self._became({call})"
        return "async def", "AsyncMachine", f"return await self._machine_of({request}{progress})"
    if result == list[Instance]:
        return "async def", "list[AsyncMachine]", f"return await self._machines_of({request})"
    if result is StandbyReport:
        return "async def", "CaptureReport", f"report = {call}\nself._became(report.instance)\nreturn report.capture"
    if result is type(None):
        return "async def", "None", call
    return "async def", _spelled(result), f"return {call}"


def _documented(kind: type[Request[Any]], parameters: list[Parameter]) -> str:
    text, marker, raises = inspect.cleandoc(kind.__doc__ or "").partition(":raises")
    lines = [text.rstrip(), "", *(f":param {each.name}: {each.description}" for each in parameters)]
    if marker:
        lines.append(marker + raises)
    documented = _wrapped("\n".join(lines).rstrip())
    indented = textwrap.indent(documented, " " * 8).strip()
    return f"{indented}\n        " if "\n" in indented else indented


def _wrapped(text: str) -> str:
    """Wrap the paragraphs and fields of a docstring for the indentation of a method; keep examples."""
    parts = re.split(r"(\n\n|\n(?=:))", text)  # separators have the odd places
    for at in range(0, len(parts), 2):
        if not re.search(r"^ ", parts[at], re.MULTILINE) or parts[at].startswith(":"):
            hanging = "    " if parts[at].startswith(":") else ""
            words = " ".join(parts[at].split())
            parts[at] = textwrap.fill(words, 92, subsequent_indent=hanging, break_on_hyphens=False)
    return "".join(parts)


_IMPORTS = """
from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from coppice.client.aio.base import Bound, MachineBase, key_of, text_of
from coppice.client.backend import Backend, Opening
from coppice.client.joining import Connecting
from coppice.model import (
    BudgetUse, Budgets, CaptureReport, Check, Egress, EgressReport, ExecResult, FileEvent, FileStat, GcReport,
    HealthCheck, Image, Limits, MemoryReport, ProgressSink, Publish, RestartPolicy, Snapshot, SnapshotKind, State,
    TreeNode, VerifyReport, Volume, VolumeMount, no_progress,
)
from coppice.model.automation import AutoStandbyStatus, SnapshotSchedule
from coppice.model.events import Event
from coppice.model.guest import ExecSession, Exit, GuestCommand, Health, StartedCommand
from coppice.model.inspection import Inspection, SnapshotInspection, VolumeInspection
from coppice.model.kernel import Kernel
from coppice.requests import (
    {requests},
)

if TYPE_CHECKING:
    from coppice.client.aio.forks import AsyncForks
    from coppice.client.aio.machine import AsyncMachine
    from coppice.host.opened import Background, RoomsOpener
    from coppice.machine.rooms import Deadlines
    from coppice.vmm.driver import VmmDriver

"""

_OF_ONE_MACHINE = ("AsyncCommands", "AsyncFiles")
_OF_ONE_INIT = """    def __init__(self, backend: Backend, machine_id: str) -> None:
        super().__init__(backend)
        self._machine_id = machine_id
"""


def _host_init() -> str:
    """Return AsyncHost's constructor, which makes the local backend unless it gets another."""
    signature = inspect.signature(OpenedHost.__init__)
    words, values, starred = ["self"], [], False
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            words.append("*")
        words.append(f"{parameter.name}: {parameter.annotation} = {parameter.default!r}")
        values.append(f"{parameter.name}={parameter.name}" if starred else parameter.name)
    doc = inspect.cleandoc(OpenedHost.__init__.__doc__ or "")
    doc = doc.replace("\n\n:raises", "\n\n`backend` carries out the requests instead of this machine.\n\n:raises", 1)
    return (
        f"    def __init__({', '.join(words)}, backend: Backend | None = None) -> None:\n"
        f'        """{textwrap.indent(doc, " " * 8).strip()}\n        """\n'
        f"        if backend is None:\n"
        f"            from coppice.host import LocalBackend\n\n"
        f"            backend = LocalBackend({', '.join(values)})\n"
        f"        super().__init__(backend)\n"
    )


def _aio_module(doc: str, classes: list[tuple[str, str, str, Operations]]) -> str:
    parts = [f'{NOTE}"""{doc}"""\n', _IMPORTS.replace("{requests}", ", ".join(requests.__all__))]
    for name, base, about, operations in classes:
        prefix = (
            "" if base == "MachineBase" or name == "HostOperations" else _name(operations[0]).partition("_")[0] + "_"
        )
        methods = {"HostOperations": [_host_init()], **{each: [_OF_ONE_INIT] for each in _OF_ONE_MACHINE}}.get(name, [])
        fixed = {"MachineBase": {"instance": "self.id"}}.get(base, {})
        if name in _OF_ONE_MACHINE:
            fixed = {"instance": "self._machine_id"}
        for kind in operations:
            methods.append(_method(kind, fixed=fixed, prefix=prefix))
            if issubclass(kind, requests.FanOut):
                methods.append(_one(kind, of_machine=base == "MachineBase"))
        parts.append(f'class {name}({base}):\n    """{about}"""\n\n' + "\n".join(methods) + "\n")
    return "\n".join(parts)


def _tidy(text: str, path: Path) -> str:
    """Return the text formatted, with sorted imports and without unused ones."""
    for command in (["check", "--fix-only", "--select", "I,F401", "-q"], ["format", "-q"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        text = done.stdout
    return text


def modules() -> dict[Path, Callable[[], str]]:
    """Return every generated module with its writer. The blocking ones read the asynchronous ones."""
    found: dict[Path, Callable[[], str]] = {}
    for name, (doc, classes) in _modules().items():
        path = CLIENT / "aio" / f"{name}.py"
        found[path] = lambda path=path, doc=doc, classes=classes: _tidy(_aio_module(doc, classes), path)  # type: ignore[misc]
    for name in (*_modules(), *_WRITTEN_BY_HAND):
        source, path = CLIENT / "aio" / f"{name}.py", CLIENT / "blocking" / f"{name}.py"
        found[path] = lambda source=source, path=path: _tidy(blocking_module(source.read_text()), path)  # type: ignore[misc]
    return found


def main(arguments: list[str]) -> int:
    """Write the modules. With --check only compare them."""
    stale = False
    for path, write in modules().items():
        text = write()
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        if "--check" in arguments:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date; run tools/generate_client.py\n")
        else:
            path.write_text(text)
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
