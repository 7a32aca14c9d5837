"""Streams of bytes between a server in a guest and a client: both ways, each with an end of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from coppice.completion import both
from coppice.errors import GuestRefused, UsageError
from coppice.model.guest import FLUSH_S, Connection

CHUNK: Final = 1 << 16
_WINDOW: Final = 1 << 18  # bytes that each end of a WebSocket may send ahead


async def joined(one: Connection, other: Connection) -> None:
    """Pass bytes both ways until both directions have ended. The first error ends both."""
    await both(pass_on(one, other), pass_on(other, one))


async def pass_on(source: Connection, target: Connection) -> None:
    """Pass bytes on until their end, or until the target has closed the connection."""
    try:
        while data := await source.receive():
            await target.send(data)
        await target.eof()
    except GuestRefused as error:
        if error.errno != errno.EPIPE:  # otherwise the target's own bytes may still have to arrive
            raise


def closed(to: int | str) -> GuestRefused:
    """Return the error for bytes to a server that has closed the connection."""
    return GuestRefused(
        f"{named(to)} has closed the connection", errno=errno.EPIPE, hint="see its log, or `coppice logs NAME`"
    )


def named(to: int | str) -> str:
    """Return the name of a port or unix socket for messages."""
    return f"port {to}" if isinstance(to, int) else to


class Control(Protocol):
    """A text frame."""

    @property
    def window(self) -> int:
        """The number of bytes that may be sent."""

    @property
    def eof(self) -> bool:
        """Whether a direction ends."""


class Flow:
    """One end of a stream of bytes over a WebSocket. The client and the server have one each.

    Binary frames are bytes. The text frame `{"window": N}` lets the other end send N more bytes, and
    `{"eof": true}` is the end of one direction. Frames are read at once, even if nothing takes their
    bytes: a WebSocket that is not read answers no pings, and does not report its end.

    :param put: sends a frame; drops it if the WebSocket is closed
    :param get: returns the next frame; its error means that no more will come
    """

    def __init__(self, put: Callable[[bytes | str], Awaitable[None]], get: Callable[[], Awaitable[bytes | Control]]):
        self._put = put
        self._get = get
        self._window = self._credit = _WINDOW  # what this end may send, and what the other end may
        self._owed = 0  # bytes that were taken since the other end last got credit
        self._chunks: deque[bytes] = deque()
        self._ended = self._sent_all = False
        self.failure: Exception | None = None  # after which no more frames come
        self._changed = asyncio.Event()
        self.received_all = False

    async def read(self) -> None:
        """Read frames until no more come."""
        try:
            while True:
                self._take(await self._get())
        except Exception as error:  # raised by each later use
            self.failure = error
            self._changed.set()

    def _take(self, frame: bytes | Control) -> None:
        if not isinstance(frame, bytes):
            self._window += frame.window
            self._ended |= frame.eof
        elif len(frame) > self._credit or self._ended:
            raise UsageError("the other end sent more than it may", hint="wait for `window` before sending more")
        elif frame:
            self._credit -= len(frame)
            self._chunks.append(frame)
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def receive(self) -> bytes:
        """Return the next bytes; nothing after their end. Credit is given for those returned before."""
        if self._owed >= _WINDOW // 4 or (self._owed and not self._chunks):
            owed, self._owed = self._owed, 0
            self._credit += owed
            await self._put(f'{{"window": {owed}}}')
        while not self._chunks and not self._ended:
            if self.failure:
                raise self.failure
            await self._change()
        if not self._chunks:
            self.received_all = True
            self._changed.set()
            return b""
        self._owed += len(self._chunks[0])
        return self._chunks.popleft()

    async def taken(self) -> None:
        """Wait until `receive` has returned everything, also the end. At most for `FLUSH_S`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while not self.received_all:
                    await self._change()

    async def send(self, data: bytes) -> None:
        """Send bytes, within the window."""
        for at in range(0, len(data), CHUNK):
            piece = data[at : at + CHUNK]
            while self._window < len(piece) and self.failure is None:
                await self._change()
            if self.failure:
                raise self.failure
            self._window -= len(piece)
            await self._put(piece)

    async def eof(self) -> None:
        """End the direction to the other end. Idempotent."""
        if not self._sent_all:
            self._sent_all = True
            await self._put('{"eof": true}')

    async def flush(self) -> None:
        """End the direction to the other end, and wait until it has taken all bytes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self.eof()
                while self._window < _WINDOW and self.failure is None:
                    await self._change()
