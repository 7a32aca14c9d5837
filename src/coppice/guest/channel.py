"""One connection to one agent port: the handshake, frames out, frames in, and a deadline on every wait."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import deque
from collections.abc import AsyncIterator
from typing import NoReturn

from coppice.errors import GuestProtocolError, GuestRefused, GuestTimeout, VmmDied
from coppice.guest.protocol import (
    MAGIC,
    NONCE_SIZE,
    PADDING,
    Fields,
    Frame,
    FrameDecoder,
    FrameType,
    encode_hello,
)

REFUSED = "the guest refused: "
_READ_SIZE = 65536


@contextlib.asynccontextmanager
async def deadline(seconds: float | None, waiting_for: str) -> AsyncIterator[None]:
    """Turn a wait that lasts too long into an error.

    :raises GuestTimeout: `seconds` have passed; None waits for ever
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise GuestTimeout(
            f"the guest did not answer within {seconds:g} s ({waiting_for})",
            hint="see its console with `coppice logs NAME`; if the host's disk was full, free some, and `coppice restore NAME` lets it run on",
        ) from error


class Channel:
    """A connected agent port. One session at a time; `begin` starts the next.

    :param patience_s: how long each single wait for the guest may last
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience_s: float) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder(bytes(NONCE_SIZE))
        self._frames: deque[Frame] = deque()
        self._clean = False  # the last session has ended, and nothing of it is half-sent
        self.patience_s = patience_s
        self.capabilities = 0  # of the agent, as it says when it answers a HELLO

    @classmethod
    async def over(cls, sock: socket.socket, patience_s: float) -> Channel:
        """A channel over a connected stream socket, which it then owns."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_READ_SIZE)
        return cls(reader, writer, patience_s)

    async def begin(self, request: bytes) -> None:
        """Open a session and send its first frames, without waiting for the acknowledgement: that saves a round trip."""
        nonce = secrets.token_bytes(NONCE_SIZE)
        self._decoder = FrameDecoder(nonce)
        self._frames.clear()
        padding = b"" if self._clean else PADDING
        self._clean = False
        await self.send(padding + encode_hello(nonce) + request)

    async def send(self, data: bytes) -> None:
        """Send frames of the session; waits while the guest does not read.

        :raises GuestTimeout: it has not read for too long
        :raises VmmDied: the port is gone
        """
        try:
            self._writer.write(data)
            async with deadline(self.patience_s, "it does not read"):
                await self._writer.drain()
        except ConnectionError as error:
            _gone(error)

    async def receive(self, *, patience_s: float | None = -1) -> Frame:
        """The next frame of the session after its acknowledgement. `patience_s` None waits for ever.

        :raises GuestTimeout: nothing came for too long
        :raises GuestProtocolError: what came is not the protocol
        :raises VmmDied: the port is gone
        """
        if patience_s is not None and patience_s < 0:
            patience_s = self.patience_s
        if not self._frames:
            async with deadline(patience_s, "no reply"):
                while not self._frames:
                    await self._more()
        return self._frames.popleft()

    async def _more(self) -> None:
        try:
            data = await self._reader.read(_READ_SIZE)
        except ConnectionError as error:
            _gone(error)
        if not data:
            _gone(None)
        for frame in self._decoder.feed(data):
            if frame.type == FrameType.HELLO_ACK:
                self.capabilities = Fields(frame.payload[len(MAGIC) + NONCE_SIZE :]).integer(2, 0)
            else:
                self._frames.append(frame)

    async def reply(self) -> Fields:
        """The final reply to a request that has one.

        :raises GuestTimeout: it did not come in time, whatever else came
        :raises GuestRefused: the agent answered with an error
        """
        async with deadline(self.patience_s, "no reply"):  # one for all: a guest that talks on and on has not answered
            frame = await self.receive(patience_s=None)
            while frame.type == FrameType.WINDOW:  # what the agent had still to say of data that it has taken
                frame = await self.receive(patience_s=None)
        return self.final(frame)

    def final(self, frame: Frame, expected: FrameType = FrameType.OK) -> Fields:
        """Take a frame that ends the session.

        :raises GuestRefused: it is an error
        :raises GuestProtocolError: it is anything else than expected
        """
        if frame.type == FrameType.ERROR:
            self._clean = True
            raise refusal(frame)
        if frame.type != expected:
            raise unexpected(frame)
        self._clean = True
        return Fields(frame.payload)

    async def close(self) -> None:
        """Close the port; the agent ends the session. Idempotent."""
        with contextlib.suppress(OSError):
            # A process that was forked meanwhile has the socket too, and would keep the port connected as long as it lives.
            self._writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def refusal(frame: Frame) -> GuestRefused:
    """The error that an ERROR frame tells of."""
    fields = Fields(frame.payload)
    return GuestRefused(
        REFUSED + fields.text(2, "no reason given"),
        errno=fields.integer(1, 0),
        hint="see the request's paths, program and user as they are inside of the guest",
    )


def unexpected(frame: Frame) -> GuestProtocolError:
    """The error for a frame that has no place here."""
    return GuestProtocolError(
        f"the guest sent a frame of type {frame.type} where it has no place",
        hint="the guest's agent and this Coppice may be of different versions: start the machine anew",
    )


def _gone(cause: BaseException | None) -> NoReturn:
    raise VmmDied(
        "the machine went away while it was talked to",
        hint="see `coppice inspect NAME` and `coppice logs --vmm NAME`, then start it again",
    ) from cause
