"""The guest's end of an agent port, for guests that answer what a test wants: frames from the host,
frames to the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

from coppice.agent.channel import Channel
from coppice.agent.protocol import (
    END_BYTE,
    HOST_PAYLOAD_MAX,
    LIMITS,
    MAGIC,
    NONCE_SIZE,
    VERSION,
    Frame,
    FrameType,
    encode_fields,
    pack32,
)

_HEADER = struct.Struct("<BHH")


class Fault(OSError):
    """Raised to answer with an ERROR of this errno and text."""


class Peer:
    """One client on one port. It answers HELLO and PING itself; a request in PARTs arrives as one
    frame.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._buffer = b""
        self._open = False
        self.features: tuple[str, ...] = (LIMITS,)
        self.takes_all = False  # whether to return WINDOW and FORGET frames too

    @classmethod
    @contextlib.asynccontextmanager
    async def over(cls, connection: socket.socket) -> AsyncIterator[Peer]:
        """Return a peer over an accepted connection, closed at the end of the block."""
        connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        try:
            yield cls(reader, writer)
        except ConnectionError:
            pass  # the host hung up
        finally:
            with contextlib.suppress(OSError):  # another owner may have the descriptor too
                writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            writer.transport.abort()

    async def receive(self) -> Frame | None:
        """Return the next frame after the handshake; None if the host has hung up."""
        parts = b""
        while (frame := await self._frame()) is not None:
            if frame.type == FrameType.HELLO:
                await self.send(FrameType.HELLO_ACK, 0, frame.payload[: len(MAGIC) + NONCE_SIZE] + self._about())
                parts = b""
            elif frame.type == FrameType.PING:
                await self.send(FrameType.PONG, 0)
            elif frame.type == FrameType.PART:
                parts += frame.payload
            elif self.takes_all or frame.type not in (FrameType.FORGET, FrameType.WINDOW):
                return Frame(frame.type, frame.stream, parts + frame.payload)
        return None

    async def _frame(self) -> Frame | None:
        while True:
            if not self._open:
                self._open = self._find_hello()
            self._buffer = self._buffer.lstrip(b"\0")
            if self._open and len(self._buffer) >= _HEADER.size:
                frame_type, stream, size = _HEADER.unpack_from(self._buffer)
                end = _HEADER.size + size
                assert size <= HOST_PAYLOAD_MAX, "the host sent a frame that is too long"
                if len(self._buffer) > end:
                    assert self._buffer[end] == END_BYTE, "the host sent a frame without its end byte"
                    payload, self._buffer = self._buffer[_HEADER.size : end], self._buffer[end + 1 :]
                    return Frame(frame_type, stream, payload)
            data = await self._reader.read(1 << 16)
            if not data:
                return None
            self._buffer += data

    def _find_hello(self) -> bool:
        at = self._buffer.find(MAGIC)
        if at < 0:
            return False
        self._buffer = self._buffer[at - _HEADER.size :]
        return True

    async def send(self, frame_type: FrameType, stream: int, payload: bytes = b"") -> None:
        """Send one frame."""
        await self.write(frame_type, stream, payload)

    async def write(self, frame_type: int, stream: int, payload: bytes) -> None:
        """Send one frame, which may be as large as those of an agent."""
        self._writer.write(_HEADER.pack(frame_type, stream, len(payload)) + payload + bytes((END_BYTE,)))
        await self._writer.drain()

    def _about(self) -> bytes:
        return encode_fields([(1, "fake"), (2, VERSION), *((3, feature) for feature in self.features)])

    async def open_window(self, stream: int, size: int) -> None:
        """Let the host send this many more bytes."""
        await self.send(FrameType.WINDOW, stream, pack32(size))


Answer = Callable[[Peer, Frame], Awaitable[None]]


@contextlib.asynccontextmanager
async def talking_to(
    answer: Answer,
    patience_s: float,
    *,
    features: tuple[str, ...] = (LIMITS,),
    is_paused: Callable[[], Awaitable[bool]] | None = None,
) -> AsyncIterator[Channel]:
    """Open a channel to a guest with custom answers."""
    ours, theirs = socket.socketpair()

    async def serve() -> None:
        async with Peer.over(theirs) as peer:
            peer.features = features
            while (frame := await peer.receive()) is not None:
                await answer(peer, frame)

    guest = asyncio.create_task(serve())
    channel = await Channel.over(ours, patience_s, is_paused)
    try:
        yield channel
    finally:
        await channel.close()
        guest.cancel()
        await asyncio.gather(guest, return_exceptions=True)
