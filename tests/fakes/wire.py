"""The guest's end of an agent port: frames from the host, frames to the host."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

from coppice.guest.protocol import (
    END_BYTE,
    HOST_PAYLOAD_MAX,
    MAGIC,
    NONCE_SIZE,
    Frame,
    FrameType,
    encode_fields,
    encode_frame,
    pack32,
)

_HEADER = struct.Struct("<BI")


class Fault(OSError):
    """The guest's answer is an ERROR with this errno and text."""


class Peer:
    """One client on one port. It answers HELLO itself; a request in PARTs arrives as one frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._buffer = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def over(cls, connection: socket.socket) -> AsyncIterator[Peer]:
        """A peer over an accepted connection, closed at the end of the block."""
        connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        try:
            yield cls(reader, writer)
        except ConnectionError:
            pass  # the host hung up
        finally:
            writer.transport.abort()

    async def receive(self) -> Frame | None:
        """The next frame that is not of the handshake; None when the host has hung up."""
        parts = b""
        while (frame := await self._frame()) is not None:
            if frame.type == FrameType.HELLO:
                await self._acknowledge(frame.payload)
                parts = b""
            elif frame.type == FrameType.PART:
                parts += frame.payload
            else:
                return Frame(frame.type, parts + frame.payload)
        return None

    async def _acknowledge(self, payload: bytes) -> None:
        if payload[: len(MAGIC)] == MAGIC and len(payload) == len(MAGIC) + NONCE_SIZE:
            await self.send(FrameType.HELLO_ACK, payload + encode_fields([(1, "fake")]))

    async def _frame(self) -> Frame | None:
        while True:
            self._buffer = self._buffer.lstrip(b"\0")
            if len(self._buffer) >= _HEADER.size:
                frame_type, size = _HEADER.unpack_from(self._buffer)
                end = _HEADER.size + size
                assert size <= HOST_PAYLOAD_MAX, "the host sent a frame that is too long"
                if len(self._buffer) > end:
                    assert self._buffer[end] == END_BYTE, "the host sent a frame that does not end where it says"
                    payload, self._buffer = self._buffer[_HEADER.size : end], self._buffer[end + 1 :]
                    return Frame(frame_type, payload)
            data = await self._reader.read(1 << 16)
            if not data:
                return None
            self._buffer += data

    async def send(self, frame_type: FrameType, payload: bytes = b"") -> None:
        """Send one frame."""
        self._writer.write(encode_frame(frame_type, payload))
        await self._writer.drain()

    async def open_window(self, size: int) -> None:
        """Let the host send so many bytes more."""
        await self.send(FrameType.WINDOW, pack32(size))
