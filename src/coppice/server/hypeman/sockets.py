"""WebSockets of the hypeman API: `/instances/{id}/exec` and `/instances/{id}/cp`.

They are not in hypeman's document; the frames are those that its SDK 0.28 sends and expects.
"""

from __future__ import annotations

import contextlib
import stat
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec
from litestar import websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath

from coppice.completion import beside, in_thread
from coppice.errors import CoppiceError, IllegalTransition, UsageError
from coppice.host import LocalBackend
from coppice.model import Instance, State
from coppice.model.guest import ExecSession
from coppice.requests import CpInRequest, CpOutRequest, ExecRequest, FileMkdirRequest, OpenExecRequest, StatRequest
from coppice.server.browsers import accept
from coppice.server.context import TheCaller, TheServer
from coppice.server.failures import failure_of
from coppice.server.hypeman.instances import WRITE
from coppice.server.hypeman.paths import find
from coppice.server.streams import Socket, answering, decoded, frame_from, send, silence

_CHUNK: Final = 32 << 10
_SHELL: Final = ("/bin/sh",)
_FAILED: Final = 127


class Command(msgspec.Struct, kw_only=True):
    """The first frame of an exec. Unknown fields are ignored."""

    command: list[str] = []
    tty: bool = False
    env: dict[str, str] = {}
    cwd: str | None = None
    timeout: float | None = None
    wait_for_agent: float | None = None
    rows: int | None = None
    cols: int | None = None


class _Size(msgspec.Struct):
    rows: int
    cols: int


class _Resize(msgspec.Struct):
    resize: _Size


class Copy(msgspec.Struct, kw_only=True):
    """The first frame of a copy."""

    direction: str
    guest_path: str
    is_dir: bool = False
    mode: int = 0o644
    uid: int | None = None
    gid: int | None = None
    follow_links: bool = False


async def _running(host: LocalBackend, key: str) -> Instance:
    """Return a running instance.

    :raises IllegalTransition: it does not run
    """
    found = await find(host, key)
    if found.state is not State.RUNNING:
        raise IllegalTransition(f"{found.name} is {found.state}", hint="start or restore it first")
    return found


def _decoded(text: bytes | str, kind: type[Any]) -> Any:
    return decoded(text, kind, "a frame is not valid")


@websocket("/instances/{key:str}/exec", opt=WRITE)
async def instance_exec(key: FromPath[str], socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Run a command: binary frames are its input and output, the last frame is its exit code."""
    host = await server.host(caller)
    found = await _running(host, key)
    await accept(socket)
    with contextlib.suppress(WebSocketDisconnect):
        code = _FAILED
        try:
            command = _decoded(await frame_from(socket), Command)
            request = _request(found, command)
            with server.observed(caller, host, request):
                code = await _exec(socket, host, request)
        except CoppiceError as error:
            await socket.send_bytes(f"Error: {failure_of(error)[1].message}\r\n".encode())
        await send(socket, exitCode=code)
        await socket.close()


def _request(found: Instance, command: Command) -> OpenExecRequest:
    return OpenExecRequest(
        instance=found.id,
        argv=command.command or _SHELL,
        env=command.env,
        workdir=command.cwd,
        tty=command.tty,
        size=None if command.rows is None or command.cols is None else (command.rows, command.cols),
        timeout_s=command.timeout or None,
    )


async def _exec(socket: Socket, host: LocalBackend, request: OpenExecRequest) -> int:
    async with host.stream(request) as session:
        await beside(_feed(socket, session), _print(socket, session))
        return (await session.wait()).exit_code


async def _print(socket: Socket, session: ExecSession) -> None:
    async for _, data in session:
        await socket.send_bytes(data)


async def _feed(socket: Socket, session: ExecSession) -> None:
    while True:
        frame = await frame_from(socket)
        if isinstance(frame, bytes):
            await session.send_stdin(frame)
        else:
            size = _decoded(frame, _Resize).resize
            await session.resize(size.rows, size.cols)


@websocket("/instances/{key:str}/cp", opt=WRITE)
async def instance_cp(key: FromPath[str], socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Copy one file or directory into the guest, or a file or tree out of it."""
    host = await server.host(caller)
    found = await _running(host, key)
    await accept(socket)
    async with answering(socket, CoppiceError, _send_copy_error):
        copy = _decoded(await frame_from(socket), Copy)
        if copy.direction not in _COPIES:
            raise UsageError(f"a copy has no direction {copy.direction!r}", hint="use to or from")
        kind, carry = _COPIES[copy.direction]
        with tempfile.TemporaryDirectory(prefix="coppice-cp-") as directory:
            request = kind(instance=found.id, guest_path=copy.guest_path, host_path=directory)
            with server.observed(caller, host, request):
                await carry(socket, host, found, copy, Path(directory))


async def _send_copy_error(socket: Socket, error: Exception) -> None:
    await send(socket, type="error", message=failure_of(error)[1].message)


async def _copy_to(socket: Socket, host: LocalBackend, found: Instance, copy: Copy, directory: Path) -> None:
    """Receive the content, then copy it as `cp` does. Missing parents are made, as in hypeman."""
    name = Path(copy.guest_path).name or "content"
    source = directory / name
    written = 0
    if copy.is_dir:
        source.mkdir()
    else:
        source.touch()
    with source.open("r+b") if not copy.is_dir else contextlib.nullcontext() as output:
        while isinstance(frame := await frame_from(socket), bytes):
            if output is not None:
                written += await in_thread(output.write, frame)
    if _decoded(frame, dict[str, Any]).get("type") != "end":
        raise UsageError("the content ends with another frame than end", hint="see the API document")
    source.chmod(copy.mode & 0o7777 or (0o755 if copy.is_dir else 0o644))
    made = copy.guest_path if copy.is_dir else str(Path(copy.guest_path).parent)
    await host.call(FileMkdirRequest(instance=found.id, path=made, parents=True))
    if not copy.is_dir:
        await host.call(CpInRequest(instance=found.id, host_path=str(source), guest_path=copy.guest_path))
    if copy.uid is not None or copy.gid is not None:
        owner = f"{'' if copy.uid is None else copy.uid}:{'' if copy.gid is None else copy.gid}"
        await host.call(ExecRequest(instance=found.id, argv=["chown", "-h", owner, copy.guest_path]))
    await send(socket, type="result", success=True, bytes_written=written)


async def _copy_from(socket: Socket, host: LocalBackend, found: Instance, copy: Copy, directory: Path) -> None:
    """Copy out of the guest, then send each member: a header, its content, and an end."""
    await host.call(StatRequest(instance=found.id, path=copy.guest_path))
    target = directory / "content"
    request = CpOutRequest(instance=found.id, guest_path=copy.guest_path, host_path=str(target))
    await beside(silence(socket), host.call(request))
    members = [target]
    if target.is_dir() and not target.is_symlink():
        members = sorted(target.rglob("*"))
    name = Path(copy.guest_path).name
    if not members:
        await _header(socket, target, name)
        await send(socket, type="end", final=True)
    for each in members:
        await _header(socket, each, name if each == target else str(each.relative_to(target)))
        if each.is_file() and not each.is_symlink():
            with each.open("rb") as content:
                while chunk := await in_thread(content.read, _CHUNK):
                    await socket.send_bytes(chunk)
        await send(socket, type="end", final=each == members[-1])


async def _header(socket: Socket, file: Path, name: str) -> None:
    status = file.lstat()
    is_link = stat.S_ISLNK(status.st_mode)
    link = {"is_symlink": True, "link_target": str(file.readlink())} if is_link else {}
    await send(
        socket,
        type="header",
        path=name,
        mode=status.st_mode & 0o777,
        is_dir=stat.S_ISDIR(status.st_mode),
        size=0 if is_link else status.st_size,
        mtime=int(status.st_mtime),
        **link,
    )


_Carry = Callable[[Socket, LocalBackend, Instance, Copy, Path], Coroutine[Any, Any, None]]
_COPIES: Final[dict[str, tuple[type[CpInRequest] | type[CpOutRequest], _Carry]]] = {
    "to": (CpInRequest, _copy_to),
    "from": (CpOutRequest, _copy_from),
}

ROUTES: Final = [instance_exec, instance_cp]
