"""Generate the blocking twin of a module of asynchronous handles: methods that wait for theirs."""

from __future__ import annotations

import ast
import re
import textwrap

NOTE = "# Written by tools/generate_client.py from client/aio: change that, then run it.\n\n"
_IMPORTS = """
import contextlib
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from coppice.client.aio.host import AsyncHost
from coppice.client.aio.machine import AsyncMachine
from coppice.client.aio.commands import AsyncCommands
from coppice.client.aio.files import AsyncFiles
from coppice.client.aio.images import AsyncImages, AsyncKernels
from coppice.client.aio.managers import AsyncSnapshots, AsyncVolumes
from coppice.client.backend import Backend, R
from coppice.client.blocking.twin import Twin
from coppice.client.portal import Portal
from coppice.client.session import ExecSession
"""
_ASYNC_WORDS = (
    (", for asyncio", ", for programs without asyncio"),
    ("async with", "with"),
    ("async for", "for"),
    ("(await ", "("),
    ("await ", ""),
    ("asynchronous", "blocking"),
)
_OPEN = """
    def open(self) -> Self:
        {doc}
        self._portal.call(self._twin.open())
        return self

"""
_CLOSE = """
    def close(self) -> None:
        {doc}
        try:
            self._portal.call(self._twin.close())
        finally:
            self._portal.close()

    def __enter__(self) -> Self:
        try:
            return self.open()
        except BaseException:
            self._portal.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""
_EXIT = """
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._portal.call(self._twin.__aexit__(kind, error, trace))

"""


def blocking_module(source: str) -> str:
    """Return the blocking twin of a module of `client/aio`."""
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Bound"]
    handles = "\n".join(
        f"from coppice.client.blocking.{module} import {name}"
        for name, module in (
            ("Forks", "forks"), ("Machine", "machine"), ("MachineBase", "base"), ("MachineGuest", "guest"),
            ("MachineLifecycle", "lifecycle"), ("MachineAutomation", "automation"), ("HostOperations", "operations"),
        )
        if name not in {_blocking(node.name) for node in classes}
    )  # fmt: skip
    if not {"AsyncImages", "AsyncVolumes"} & {node.name for node in classes}:
        handles += "\nfrom coppice.client.blocking.images import Images, Kernels"
        handles += "\nfrom coppice.client.blocking.managers import Snapshots, Volumes"
    if "AsyncCommands" not in {node.name for node in classes}:
        handles += "\nfrom coppice.client.blocking.commands import Commands"
    if "AsyncFiles" not in {node.name for node in classes}:
        handles += "\nfrom coppice.client.blocking.files import Files"
    doc = _blocking(ast.get_docstring(tree) or "")
    late = [line for line in handles.splitlines() if line.endswith((" Forks", " Machine"))]
    now = [line for line in handles.splitlines() if line not in late]
    parts = [
        f'{NOTE}"""{doc}"""\n\nfrom __future__ import annotations\n',
        *map(ast.unparse, _imports(tree)),
        _IMPORTS,
        "\n".join(now),
        "if TYPE_CHECKING:\n" + textwrap.indent("\n".join([*late, *_for_types(tree)]), "    ") + "\n",
        *(_class(node) for node in classes),
    ]
    return "\n".join(parts)


def _imports(tree: ast.Module) -> list[ast.stmt]:
    """Return the module's imports, except of its own kind. Unused ones are removed later."""
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("coppice.client", "__future__")))
    ]
    for node in found:
        node.names = [name for name in node.names if name.name != "ExecSession"]
    return [node for node in found if node.names]


def _for_types(tree: ast.Module) -> list[str]:
    return [
        ast.unparse(inner)
        for node in tree.body
        if isinstance(node, ast.If)
        for inner in node.body
        if "coppice.client" not in ast.unparse(inner)
    ]


def _blocking(text: str) -> str:
    """Replace words for the asynchronous side by those for the blocking one."""
    text = re.sub(r"\bAsync([A-Z]\w*)", r"\1", text)
    for old, new in _ASYNC_WORDS:
        text = text.replace(old, new)
    return text


def _twin_of(name: str) -> str:
    """Return the asynchronous class that a blocking one waits for."""
    if name.startswith("Machine"):
        return "AsyncMachine"
    return "AsyncHost" if name == "HostOperations" else name


def _class(node: ast.ClassDef) -> str:
    bases = [_blocking(ast.unparse(base)) for base in node.bases]
    shown = ", ".join(f"Twin[{_twin_of(node.name)}]" if base == "Bound" else base for base in bases)
    doc = _docstring(node, 4)
    methods = [_method(node, each) for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return f"class {_blocking(node.name)}({shown}):\n    {doc}\n\n" + "\n".join(methods) + "\n"


def _docstring(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, indent: int) -> str:
    text = _blocking(ast.get_docstring(node) or "")
    lines = textwrap.indent(text, " " * indent).strip()
    return f'"""{lines}\n{" " * indent}"""' if "\n" in lines else f'"""{lines}"""'


def _method(owner: ast.ClassDef, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    doc = _docstring(node, 8)
    if node.name == "__init__" and owner.name == "HostOperations":
        given = ", ".join(_passed(node.args))
        made = f"from coppice.client.aio.host import AsyncHost\n\nsuper().__init__(Portal(), AsyncHost({given}))"
        return f"    def __init__({ast.unparse(node.args)}) -> None:\n        {doc}\n{textwrap.indent(made, ' ' * 8)}\n"
    if owner.name == "AsyncHost" and node.name in ("open", "close"):
        return (_OPEN if node.name == "open" else _CLOSE).replace("{doc}", doc)
    if node.name == "__aenter__" and owner.name != "AsyncHost":
        return _EXIT
    if node.name.startswith("_") or node.name == "stream":  # handles have methods for each stream
        return ""
    result = ast.unparse(node.returns) if node.returns else "None"
    called = f"self._twin.{node.name}"
    if any(ast.unparse(each) != "checked" for each in node.decorator_list):  # a property
        shown = _blocking(result)
        value = f"{shown}(self._portal, {called})" if shown != result else called
        return f"    @property\n    def {node.name}(self) -> {shown}:\n        {doc}\n        return {value}\n"
    called += f"({', '.join(_passed(node.args))})"
    head = f"def {node.name}({ast.unparse(node.args)}) -> "
    if result.startswith("AbstractAsyncContextManager"):
        body = f"with self._portal.within({called}) as opened:\n    yield ExecSession(self._portal, opened)"
        return _whole(f"@contextlib.contextmanager\n    {head}Iterator[ExecSession]", doc, body)
    if result == "Connecting":
        body = f"with self._portal.within({called}.as_socket()) as opened:\n    yield opened"
        return _whole(f"@contextlib.contextmanager\n    {head}Iterator[socket.socket]", doc, body)
    if result.startswith("AsyncIterator"):
        return _whole(head + result.removeprefix("Async"), doc, f"return self._portal.iterate({called})")
    result = re.sub(r"^Opening\[(.*)\]$", r"\1", result)
    waited = f"self._portal.call({called})"
    asks = isinstance(node, ast.AsyncFunctionDef) or result != ast.unparse(node.returns or node)  # or it is an Opening
    body = {
        "None": waited,
        "Self": f"{waited}\nreturn self",
        "AsyncMachine": f"return self._machine({waited if asks else called})",
        "list[AsyncMachine]": f"return self._machines({waited})",
        "AsyncForks": f"return self._forks({waited})",
    }.get(result, f"return {waited}")
    return _whole(head + _blocking(result), doc, body)


def _whole(head: str, doc: str, body: str) -> str:
    return f"    {head}:\n        {doc}\n{textwrap.indent(body, ' ' * 8)}\n"


def _passed(args: ast.arguments) -> list[str]:
    """Return the arguments that pass on a method's parameters."""
    positional = [each.arg for each in args.args[1:]]
    return [*positional, *(f"{each.arg}={each.arg}" for each in args.kwonlyargs)]
