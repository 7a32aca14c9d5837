"""Commands and logs of a server, over WebSockets. `coppice.server.streams` describes the frames."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import msgspec
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode

from coppice.agent.collecting import Collecting
from coppice.client.remote.address import Address
from coppice.client.remote.failures import encoded, error_from, refusal, unreachable
from coppice.client.remote.patience import received
from coppice.client.remote.tracing import trace_headers
from coppice.errors import GuestRefused, HostCannot
from coppice.flow import CHUNK
from coppice.model import FileEvent, FileStat, Instance, Record
from coppice.model.guest import Exit, Stream, Unpacked
from coppice.requests import CommandAttachRequest, FileLsRequest, FileWatchRequest, LogsRequest, OpenExecRequest

_OPEN_S: Final = 10.0
_CLOSE_S: Final = 5.0
_STREAMS: Final[dict[int, Stream]] = {1: "stdout", 2: "stderr"}
_LOST: Final = "the connection to the server was lost"
_ENDED: Final = "the server has ended"


class Message(Record, frozen=True, kw_only=True):
    """A text frame of the server."""

    pid: int | None = None
    command: str = ""
    offset: int = 0
    dropped: int = 0
    exit: Exit | None = None
    error: dict[str, Any] | None = None
    errno: int = 0
    end: bool = False
    eof: bool = False
    window: int = 0
    stat: FileStat | None = None
    event: FileEvent | None = None
    unpacked: Unpacked | None = None
    upload: str | None = None
    instance: Instance | None = None


@contextlib.asynccontextmanager
async def opened(
    address: Address,
    headers: Mapping[str, str],
    path: str,
    first: msgspec.Struct,
) -> AsyncIterator[ClientConnection]:
    """Open a WebSocket and send the first frame."""
    url = address.websocket_url + path
    message = encoded(first).decode()
    options: dict[str, Any] = {
        "additional_headers": {**headers, **trace_headers()},
        "open_timeout": _OPEN_S,
        "max_size": None,
        "ping_interval": None,  # `received` asks
        "compression": None,  # costs more than it saves: a gigabyte of zeros would take seconds of CPU at both ends
    }
    opening = unix_connect(address.socket, url, **options) if address.socket else connect(url, **options)
    try:
        connection = await opening
    except InvalidStatus as error:
        raise refusal(error.response.status_code, bytes(error.response.body)) from error
    except (OSError, TimeoutError, WebSocketException) as error:
        raise unreachable(address, error) from error
    try:
        await connection.send(message)
        yield connection
    finally:
        try:
            # Frames before the last one may wait for a server that does not read them.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await connection.close()
        finally:
            connection.transport.abort()


async def next_frame(connection: ClientConnection) -> bytes | Message:
    """Return the next frame.

    :raises CoppiceError: the server reports an error, or the connection was lost
    """
    try:
        frame = await received(connection)
    except ConnectionClosed as error:
        ended = error.rcvd is not None and error.rcvd.code == CloseCode.SERVICE_RESTART
        raise HostCannot(
            _ENDED if ended else _LOST, hint="the command or copy may have run; `coppice ls` shows the machine"
        ) from error
    if isinstance(frame, bytes):
        return frame
    message = msgspec.json.decode(frame, type=Message)
    if message.error is not None:
        reported = error_from(msgspec.json.encode(message.error))
        if isinstance(reported, GuestRefused):
            reported.errno = message.errno
        raise reported
    return message


async def message_of(connection: ClientConnection) -> Message:
    """Return the next frame, which must be a text frame.

    :raises CoppiceError: the server reports an error, or the connection was lost
    """
    frame = await next_frame(connection)
    if isinstance(frame, bytes):
        raise not_coppice()
    return frame


def not_coppice() -> HostCannot:
    """Return the error for an unexpected answer."""
    return HostCannot("the server's answer is not that of Coppice", hint="check the address and the server's version")


class RemoteExecSession(Collecting):
    """A command that runs in a guest of a server."""

    def __init__(self, connection: ClientConnection, name: str, timeout_s: float | None, first: Message) -> None:
        super().__init__(name, timeout_s)
        if first.pid is None:
            raise not_coppice()
        self.id = first.command
        self.pid = first.pid
        self.offset = first.offset
        self.dropped_bytes = 0
        self._connection = connection

    async def __aiter__(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Yield the command's output as it arrives, until the command has ended."""
        while self._exit is None:
            try:
                frame = await next_frame(self._connection)
            except HostCannot as error:
                if error.message in (_LOST, _ENDED):
                    error.hint = f"the command goes on: `coppice attach NAME {self.id}` shows its output"
                raise
            if isinstance(frame, bytes):
                self.offset += len(frame) - 1
                yield _STREAMS[frame[0]], frame[1:]
            elif frame.exit is not None:
                self._exit = frame.exit
            else:
                self.offset += frame.dropped
                self.dropped_bytes += frame.dropped

    async def send_stdin(self, data: bytes) -> None:
        """Send data to the command's standard input."""
        for at in range(0, len(data), CHUNK):  # a server refuses large frames
            await self._send(data[at : at + CHUNK])

    async def eof(self) -> None:
        """Close the command's standard input."""
        await self._control(eof=True)

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        await self._control(signal=number)

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal."""
        await self._control(resize=(rows, columns))

    async def leave(self) -> None:
        """Let the command run on when the session is closed."""
        await self._control(leave=True)

    async def _control(self, **message: object) -> None:
        await self._send(msgspec.json.encode(message).decode())

    async def _send(self, data: bytes | str) -> None:
        with contextlib.suppress(ConnectionClosed):  # the reader reports the lost connection
            await self._connection.send(data)


@contextlib.asynccontextmanager
async def open_exec(
    address: Address, headers: Mapping[str, str], request: OpenExecRequest
) -> AsyncIterator[RemoteExecSession]:
    """Start a command on the server. Leaving the block ends the command."""
    async with opened(address, headers, "/stream/exec", request) as connection:
        yield RemoteExecSession(connection, request.argv[0], request.timeout_s, await message_of(connection))


@contextlib.asynccontextmanager
async def attach(
    address: Address, headers: Mapping[str, str], request: CommandAttachRequest
) -> AsyncIterator[RemoteExecSession]:
    """Attach to a command on the server. Leaving the block lets it run on."""
    async with opened(address, headers, "/stream/attach", request) as connection:
        yield RemoteExecSession(connection, f"command {request.command}", None, await message_of(connection))


@contextlib.asynccontextmanager
async def open_logs(
    address: Address, headers: Mapping[str, str], request: LogsRequest
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Follow a log on the server."""
    async with opened(address, headers, "/stream/logs", request) as connection:
        yield _lines(connection)


async def _lines(connection: ClientConnection) -> AsyncIterator[bytes]:
    while isinstance(frame := await next_frame(connection), bytes):
        yield frame


@contextlib.asynccontextmanager
async def list_files(
    address: Address, headers: Mapping[str, str], request: FileLsRequest
) -> AsyncIterator[AsyncIterator[FileStat]]:
    """List a directory of a guest of the server."""
    async with opened(address, headers, "/stream/file_ls", request) as connection:
        yield _stats(connection)


async def _stats(connection: ClientConnection) -> AsyncIterator[FileStat]:
    while (found := (await message_of(connection)).stat) is not None:
        yield found


@contextlib.asynccontextmanager
async def watch_files(
    address: Address, headers: Mapping[str, str], request: FileWatchRequest
) -> AsyncIterator[AsyncIterator[FileEvent]]:
    """Watch a path of a guest of the server."""
    async with opened(address, headers, "/stream/file_watch", request) as connection:
        yield _changes(connection)


async def _changes(connection: ClientConnection) -> AsyncIterator[FileEvent]:
    while (found := (await message_of(connection)).event) is not None:
        yield found
