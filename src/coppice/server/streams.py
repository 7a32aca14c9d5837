"""WebSocket `/stream/exec`, `/stream/attach` and `/stream/logs`: results that stay open while they are
used.

The client sends the request as a JSON text frame. Then, for a command: binary frames to the server
are standard input; text frames are `{"eof": true}`, `{"signal": N}`, `{"resize": [ROWS, COLUMNS]}` or
`{"leave": true}`. The server sends `{"pid": N, "command": ID, "offset": N}`, then binary frames of
output, whose first byte is 1 (stdout) or 2 (stderr), and at the end `{"exit": {...}}`. Before output,
`{"dropped": N}` says how many bytes at this place are no longer kept. For a log: binary frames are
its lines. All can end with `{"error": {...}}`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import msgspec
from litestar import WebSocket, websocket
from litestar.exceptions import WebSocketDisconnect

from coppice.completion import beside
from coppice.errors import CoppiceError, UsageError
from coppice.host import LocalBackend
from coppice.model.guest import ExecSession
from coppice.requests import CommandAttachRequest, LogsRequest, OpenExecRequest, StreamRequest
from coppice.server.auth import Caller
from coppice.server.browsers import accept
from coppice.server.context import Server, TheCaller, TheServer
from coppice.server.failures import failure_of
from coppice.server.table import scope_of

Socket = WebSocket[Caller, Any, Any]
_STREAM: Final = {"stdout": b"\x01", "stderr": b"\x02"}
_LOST: Final = frozenset({1006, 1011, 1012})
"""How a connection ends without the client's will: it broke, it was silent, or the server ends."""


class Control(msgspec.Struct, forbid_unknown_fields=True):
    """A text frame of a client."""

    eof: bool = False
    signal: int | None = None
    resize: tuple[int, int] | None = None
    leave: bool = False


async def first_frame(socket: Socket, kind: type[Any]) -> Any:
    """Accept a connection and return its request.

    :raises UsageError: the first frame is not a valid request
    """
    await accept(socket)
    return decoded(await socket.receive_text(), kind, "the first frame is not a valid request")


def decoded(text: bytes | str, kind: type[Any], problem: str) -> Any:
    """Return the content of a JSON frame.

    :raises UsageError: it is not of this kind; the message begins with `problem`
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{problem}: {error}", hint="see the API document") from error


async def send(socket: Socket, **message: object) -> None:
    """Send one text frame."""
    await socket.send_text(msgspec.json.encode(message).decode())


async def send_error(socket: Socket, error: Exception) -> None:
    """Send the frame of an error."""
    await send(socket, error=failure_of(error)[1])


@contextlib.asynccontextmanager
async def answering(
    socket: Socket,
    kind: type[Exception] = Exception,
    report: Callable[[Socket, Exception], Awaitable[None]] = send_error,
) -> AsyncIterator[None]:
    """Answer with the error of a block, and close the connection. A client that goes away ends the
    block.

    :param kind: the errors that are reported; others are raised
    """
    with contextlib.suppress(WebSocketDisconnect):
        try:
            yield
        except WebSocketDisconnect:
            raise
        except kind as error:
            await report(socket, error)
        await socket.close()


@websocket("/stream/exec", opt={"scope": scope_of("open_exec")})
async def stream_exec(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Run a command. A client that closes the connection ends it; one whose connection is lost does not."""
    await _run(socket, server, caller, OpenExecRequest)


@websocket("/stream/attach", opt={"scope": scope_of("command_attach")})
async def stream_attach(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Attach to a command, which goes on without its clients."""
    await _run(socket, server, caller, CommandAttachRequest)


async def _run(socket: Socket, server: Server, caller: Caller, kind: type[StreamRequest[ExecSession]]) -> None:
    async with answering(socket):
        request = await first_frame(socket, kind)
        host = await server.host(caller)
        with server.observed(caller, host, request):
            async with host.stream(request) as session:
                await send(socket, pid=session.pid, command=session.id, offset=session.offset)
                try:
                    await beside(_feed(socket, session), _print(socket, session))
                    await send(socket, exit=await session.wait())
                except (WebSocketDisconnect, OSError) as error:
                    end = await _end_of(socket, error)
                    if end.code in _LOST:
                        await session.leave()
                    raise end from error


async def _end_of(socket: Socket, error: WebSocketDisconnect | OSError) -> WebSocketDisconnect:
    """Return the end of a connection. Sending fails before its closing frame is read."""
    while not isinstance(error, WebSocketDisconnect):
        try:
            await frame_from(socket)
        except WebSocketDisconnect as end:
            return end
    return error


async def _print(socket: Socket, session: ExecSession) -> None:
    told = 0
    async for stream, data in session:
        if session.dropped_bytes > told:
            await send(socket, dropped=session.dropped_bytes - told)
            told = session.dropped_bytes
        await socket.send_bytes(_STREAM[stream] + data)
    if session.dropped_bytes > told:
        await send(socket, dropped=session.dropped_bytes - told)


async def _feed(socket: Socket, session: ExecSession) -> None:
    while True:
        message = await frame_from(socket)
        if isinstance(message, bytes):
            await session.send_stdin(message)
            continue
        control = decoded(message, Control, "a text frame is not valid")
        if control.signal is not None:
            await session.signal(control.signal)
        if control.resize is not None:
            await session.resize(*control.resize)
        if control.eof:
            await session.eof()
        if control.leave:
            await session.leave()


async def frame_from(socket: Socket) -> bytes | str:
    """Return the next frame of a client.

    :raises WebSocketDisconnect: the client went away
    """
    event: dict[str, Any] = dict(await socket.receive())
    if event["type"] == "websocket.disconnect":
        # uvicorn calls a broken connection 1005, as a closing frame without a code, which has a reason.
        broke = event.get("code") == 1005 and "reason" not in event
        raise WebSocketDisconnect(detail="the client went away", code=1006 if broke else event.get("code", 1006))
    data: bytes | None = event.get("bytes")
    return data if data is not None else event.get("text") or ""


async def silence(socket: Socket) -> None:
    """Wait until the client goes away, which ends the work next to this.

    :raises UsageError: the client sends a frame
    """
    await frame_from(socket)
    raise UsageError("a frame arrived before the end of a copy", hint="wait for the frame `end`")


@websocket("/stream/logs", opt={"scope": scope_of("logs")})
async def stream_logs(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Send the lines of a log."""
    async with answering(socket, CoppiceError):
        request = await first_frame(socket, LogsRequest)
        await send_lines(socket, await server.host(caller), request)
        await send(socket, end=True)


async def send_lines(socket: Socket, host: LocalBackend, request: LogsRequest, *, end: bytes = b"") -> None:
    """Send the lines of a log, each followed by `end`, until the log ends.

    :raises WebSocketDisconnect: the client went away, even if there are no new lines
    """

    async def printing() -> None:
        async with host.stream(request) as lines:
            async for line in lines:
                await socket.send_bytes(line + end)

    async def listening() -> None:
        while True:
            await frame_from(socket)

    await beside(listening(), printing())
