"""A stream of bytes to a TCP port or a unix socket of a guest."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator
from typing import Final

from coppice.agent.channel import Channel
from coppice.agent.protocol import FrameType, encode_fields
from coppice.agent.stream import RemoteStream, unexpected
from coppice.errors import CoppiceError, GuestRefused
from coppice.flow import closed, named
from coppice.model.guest import FLUSH_S

UNIX: Final = "unix:"
_BUSY_S: Final = 10.0  # for which a connection to a socket with a full queue is tried again
_PAUSE_S: Final = 0.05


class GuestConnection:
    """An open connection."""

    def __init__(self, stream: RemoteStream, to: int | str) -> None:
        self._stream = stream
        self._to = to
        self._received_all = self._sent_all = False

    async def receive(self) -> bytes:
        """Return the next bytes from the server; nothing after their end.

        :raises GuestRefused: the server broke the connection
        :raises VmmDied: the machine ended
        :raises GuestTimeout: the guest is silent
        """
        if self._received_all:
            return b""
        frame = await self._stream.receive()
        if frame.type == FrameType.DATA:
            return frame.payload
        if frame.type == FrameType.ERROR:
            try:
                self._stream.final(frame)
            except GuestRefused as error:
                raise _refused(error, f"the connection to {named(self._to)} was lost") from None
        if frame.type != FrameType.DATA_EOF:
            raise unexpected(frame)
        self._received_all = True
        return b""

    async def send(self, data: bytes) -> None:
        """Send bytes to the server. Waits while the server does not read.

        :raises GuestRefused: the server has closed the connection (`errno` EPIPE)
        """
        await self._stream.send_data(FrameType.DATA, data)
        if self._stream.ended:
            raise closed(self._to)

    async def eof(self) -> None:
        """End the direction to the server. Idempotent."""
        if not self._sent_all:
            self._sent_all = True
            await self._stream.send(FrameType.DATA_EOF)

    async def flush(self) -> None:
        """End the direction to the server, and wait until the server's kernel has all bytes."""
        with contextlib.suppress(CoppiceError, TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await self.eof()
                await self._stream.taken()


@contextlib.asynccontextmanager
async def connect(channel: Channel, to: int | str) -> AsyncIterator[GuestConnection]:
    """Connect to a TCP port of the guest's loopback, or to `unix:PATH`, for a block.

    Bytes that were sent reach the server, even if the block ends directly afterwards.

    :raises GuestRefused: nothing listens there; `errno` is that of the guest's kernel
    """
    stream = await _opened(channel, to)
    try:
        connection = GuestConnection(stream, to)
        yield connection
        await connection.flush()
    finally:
        stream.abandon()


async def _opened(channel: Channel, to: int | str) -> RemoteStream:
    target = (1, to) if isinstance(to, int) else (2, to.removeprefix(UNIX))
    end = asyncio.get_running_loop().time() + _BUSY_S
    while True:
        stream = await channel.open(FrameType.CONNECT, encode_fields([target]))
        try:
            await stream.opened()
        except GuestRefused as error:
            # The queue of a unix socket is full. The kernel has no event for free space in it.
            if error.errno != errno.EAGAIN or asyncio.get_running_loop().time() >= end:
                raise _refused(error, f"cannot connect to {named(to)} in the guest") from None
            await asyncio.sleep(_PAUSE_S)
        except BaseException:
            stream.abandon()
            raise
        else:
            return stream


def _refused(error: GuestRefused, what: str) -> GuestRefused:
    return GuestRefused(f"{what}: {os.strerror(error.errno)}", errno=error.errno, hint=error.hint)
