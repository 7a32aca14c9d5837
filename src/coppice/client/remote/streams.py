"""WebSockets of a server, and its logs. `coppice.server.streams` describes the frames."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import msgspec
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus, WebSocketException
from websockets.frames import CloseCode

from coppice.client.remote.address import Address
from coppice.client.remote.failures import encoded, error_from, refusal, unreachable
from coppice.client.remote.tracing import trace_headers
from coppice.errors import GuestRefused, HostCannot
from coppice.model import FileEvent, FileStat, Instance, Record
from coppice.model.guest import Exit, Unpacked
from coppice.requests import FileLsRequest, FileWatchRequest, LogsRequest

_OPEN_S: Final = 10.0
_CLOSE_S: Final = 5.0
QUIET_S: Final = 20.0  # without a frame, after which the server is asked for a sign of life
PATIENCE_S: Final = 40.0  # for that sign


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
        "ping_interval": None,  # `_received` asks
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


async def _received(connection: ClientConnection) -> str | bytes:
    """Return the next frame.

    The keepalive of the WebSocket's library is off: it counts the time in which nobody reads, as
    when the output goes to a pager, and ends a connection that works.

    :raises ConnectionClosed: the connection ended, or the server gives no sign of life
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(QUIET_S):
            return await connection.recv()
    receiving = asyncio.ensure_future(connection.recv())
    try:
        while not receiving.done():
            sign = asyncio.ensure_future(await connection.ping())
            # A frame is a sign too: the answer to the ping may come behind many of them.
            signs: set[asyncio.Future[Any]] = {receiving, sign}
            await asyncio.wait(signs, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and not sign.done():
                raise ConnectionClosedError(None, None)
            await asyncio.wait({receiving}, timeout=QUIET_S)
        return receiving.result()
    finally:
        receiving.cancel()
        await asyncio.wait({receiving})


async def next_frame(connection: ClientConnection) -> bytes | Message:
    """Return the next frame.

    :raises CoppiceError: the server reports an error, or the connection was lost
    """
    try:
        frame = await _received(connection)
    except ConnectionClosed as error:
        ended = error.rcvd is not None and error.rcvd.code == CloseCode.SERVICE_RESTART
        raise HostCannot(
            "the server has ended" if ended else "the connection to the server was lost",
            hint="the command or copy may have run; `coppice ls` shows the machine",
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


def is_lost(error: HostCannot) -> bool:
    """Return whether an error of `opened` or `next_frame` says that there is no connection any more."""
    return isinstance(error.__cause__, OSError | TimeoutError | WebSocketException)


def may_have_arrived(error: HostCannot) -> bool:
    """Return whether what was sent before an error may have arrived."""
    return isinstance(error.__cause__, ConnectionClosed)


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
async def open_items(
    address: Address, headers: Mapping[str, str], request: FileLsRequest | FileWatchRequest
) -> AsyncIterator[AsyncIterator[FileStat | FileEvent]]:
    """Open what the server sends one by one, such as the entries of a directory of a guest."""
    async with opened(address, headers, f"/stream/{request.operation}", request) as connection:
        yield _items(connection)


async def _items(connection: ClientConnection) -> AsyncIterator[FileStat | FileEvent]:
    while (found := (message := await message_of(connection)).stat or message.event) is not None:
        yield found
