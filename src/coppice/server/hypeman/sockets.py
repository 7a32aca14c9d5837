"""The WebSocket `/instances/{id}/exec` of the hypeman API. `copies` has the other one.

They are not in hypeman's document; the frames are those that its SDK 0.28 sends and expects.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import msgspec
from litestar import websocket
from litestar.exceptions import WebSocketDisconnect
from litestar.params import FromPath

from coppice.completion import beside
from coppice.errors import CoppiceError, IllegalTransition
from coppice.host import LocalBackend
from coppice.model import Instance, State
from coppice.model.guest import ExecSession
from coppice.requests import OpenExecRequest
from coppice.server.browsers import accept
from coppice.server.context import TheCaller, TheServer
from coppice.server.failures import failure_of
from coppice.server.hypeman.instances import WRITE
from coppice.server.hypeman.paths import find
from coppice.server.streams import Socket, decoded, frame_from, send

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


async def running(host: LocalBackend, key: str) -> Instance:
    """Return a running instance.

    :raises IllegalTransition: it does not run
    """
    found = await find(host, key)
    if found.state is not State.RUNNING:
        raise IllegalTransition(f"{found.name} is {found.state}", hint="start or restore it first")
    return found


def decoded_frame(text: bytes | str, kind: type[Any]) -> Any:
    """Return the content of a JSON frame.

    :raises UsageError: it is not valid
    """
    return decoded(text, kind, "a frame is not valid")


@websocket("/instances/{key:str}/exec", opt=WRITE)
async def instance_exec(key: FromPath[str], socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Run a command: binary frames are its input and output, the last frame is its exit code."""
    host = await server.host(caller)
    found = await running(host, key)
    await accept(socket)
    with contextlib.suppress(WebSocketDisconnect):
        code = _FAILED
        try:
            command = decoded_frame(await frame_from(socket), Command)
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
            size = decoded_frame(frame, _Resize).resize
            await session.resize(size.rows, size.cols)


ROUTES: Final = [instance_exec]
