"""One connection to an agent port: handshake, streams over it, and keepalives.

Many streams share the connection. Each has a window in both directions, so a stream that is not
read fills no memory and delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final, cast

from coppice.agent.protocol import (
    MAGIC,
    NONCE_SIZE,
    OLDER_HINT,
    STREAMS_MAX,
    Fields,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
    encode_hello,
    encode_request,
)
from coppice.agent.stream import RemoteStream, deadline, refusal, unexpected
from coppice.errors import Busy, CoppiceError, GuestProtocolError, GuestTimeout, NotSupported, VmmDied

PING_AFTER_S: Final = 5.0  # of silence while a stream is open
_FLUSH_S: Final = 1.0


class Channel(asyncio.Protocol):
    """A connected agent port, for any number of streams at once.

    :param patience_s: the limit of each single wait for the guest
    :param is_paused: asked when the guest is silent. A paused machine is waited for
    """

    def __init__(
        self, sock: socket.socket, patience_s: float, is_paused: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        self._socket = sock
        self._is_paused = is_paused
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport  # from `connection_made` on
        self._nonce = os.urandom(NONCE_SIZE)
        self._decoder = FrameDecoder(self._nonce)
        self._streams: dict[int, RemoteStream] = {}
        self._next_id = 0
        self._opened = False  # HELLO was sent
        self._heard = 0.0  # loop time of the last bytes from the guest
        self._writable = asyncio.Event()  # the guest reads what is sent, or the connection has ended
        self._ended = asyncio.Event()
        self._next_look: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self.failure: CoppiceError | None = None  # the connection is of no more use
        self.patience_s = patience_s
        self._answered = asyncio.Event()  # HELLO was answered, or the connection has failed
        self.agent_version = ""  # known after the answer to HELLO, as the next two
        self.protocol = 0
        self.features: frozenset[str] = frozenset()

    @classmethod
    async def over(
        cls, sock: socket.socket, patience_s: float, is_paused: Callable[[], Awaitable[bool]] | None = None
    ) -> Channel:
        """Return a channel over a connected stream socket. The channel owns the socket."""
        sock.setblocking(False)
        channel = cls(sock, patience_s, is_paused)
        await channel._loop.create_unix_connection(lambda: channel, sock=sock)
        return channel

    # ---- requests ----

    async def open(self, kind: FrameType, payload: bytes = b"") -> RemoteStream:
        """Send a request on a new stream. The first one goes out together with the handshake.

        :raises Busy: all streams of the connection are in use
        :raises UsageError: the request is too large
        :raises VmmDied: the port is closed
        """
        stream = RemoteStream(self, self._free_id(), kind)
        request = self._opening() + encode_request(kind, stream.id, payload)
        self._streams[stream.id] = stream
        try:
            await self.send(request)
        except BaseException:
            stream.abandon()
            raise
        return stream

    def _opening(self) -> bytes:
        """Return the handshake, and begin to watch for silence; nothing if that was done before."""
        if self._opened:
            return b""
        self._opened = True
        self._heard = self._loop.time()
        self._look_later()
        return encode_hello(self._nonce)

    async def greet(self) -> None:
        """Wait until the agent has answered the handshake.

        :raises GuestTimeout: it did not in time
        :raises VmmDied: the port is closed
        """
        await self.send(self._opening())
        async with deadline(self.patience_s, "no answer to the handshake"):
            await self._answered.wait()
        if self.failure:
            raise self.failure

    async def require(self, feature: str, what: str) -> None:
        """Refuse an operation that the agent would not carry out, because it is older than this host.

        :param what: the name of the feature in a sentence
        :raises NotSupported: the agent does not have the feature
        :raises GuestTimeout: the agent does not answer the handshake in time
        :raises VmmDied: the port is closed
        """
        await self.greet()
        if feature not in self.features:
            raise NotSupported(f"the machine was captured with an older agent, which has no {what}", hint=OLDER_HINT)

    def _free_id(self) -> int:
        for _ in range(STREAMS_MAX):
            self._next_id = self._next_id % STREAMS_MAX + 1
            if self._next_id not in self._streams:
                return self._next_id
        raise Busy(
            "all streams to the machine's agent are in use", hint="wait until a command has ended, then try again"
        )

    async def call(self, kind: FrameType, payload: bytes = b"") -> Fields:
        """Send a request and return the fields of its reply.

        :raises GuestTimeout: the reply did not come in time
        :raises GuestRefused: the agent answered with an error
        """
        stream = await self.open(kind, payload)
        try:
            return await stream.reply()
        finally:
            stream.abandon()

    def unanswered_before(self, stream: RemoteStream) -> int:
        """Return how many requests that were sent before this one are not answered yet."""
        earlier = itertools.takewhile(lambda each: each is not stream, self._streams.values())
        return sum(not each.begun for each in earlier)

    # ---- sending ----

    async def send(self, data: bytes) -> None:
        """Send frames. Waits while the guest does not read.

        :raises GuestTimeout: the guest did not read in time
        :raises VmmDied: the port is closed
        """
        self.post(data)
        if not self._writable.is_set():
            async with deadline(self.patience_s, "it does not read"):
                await self._writable.wait()
        if self._transport.is_closing():
            self._fail(gone())
        if self.failure:
            raise self.failure

    def post(self, data: bytes) -> None:
        """Send frames without waiting. For small ones whose number is bounded.

        :raises CoppiceError: the connection has failed
        """
        if self.failure:
            raise self.failure
        self._transport.write(data)

    def forget(self, stream_id: int) -> None:
        """Drop a stream whose last frame has come."""
        self._streams.pop(stream_id, None)

    # ---- callbacks of the transport ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport of the socket."""
        self._transport = cast(asyncio.Transport, transport)
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Hand frames of the guest to their streams."""
        self._heard = self._loop.time()
        try:
            for frame in self._decoder.feed(data):
                self._dispatch(frame)
        except CoppiceError as error:
            self._decoder = FrameDecoder(self._nonce)  # drops what was received
            self._fail(error)

    def eof_received(self) -> bool:
        """Fail the streams. The transport stays, for what was sent."""
        self._fail(gone())
        return True

    def pause_writing(self) -> None:
        """Let senders wait: the guest does not read."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let senders go on."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - each is the same for the streams
        """Fail the streams and wake senders."""
        self._fail(gone())
        self._writable.set()
        self._ended.set()

    # ---- receiving ----

    def _dispatch(self, frame: Frame) -> None:
        if frame.type == FrameType.HELLO_ACK:
            fields = Fields(frame.payload[len(MAGIC) + NONCE_SIZE :])
            self.agent_version, self.protocol = fields.text(1), fields.integer(2, 0)
            self.features = frozenset(fields.texts(3))
            self._answered.set()
        elif stream := self._streams.get(frame.stream):
            stream.take(frame)
        elif frame.stream == 0 and frame.type == FrameType.ERROR:
            error = refusal(frame, None)
            raise GuestProtocolError(
                f"the agent broke off the connection: {error.message}",
                hint="try again; if it happens again, report it with the output of `coppice doctor`",
            )
        elif frame.type != FrameType.PONG:
            raise unexpected(frame)

    def _fail(self, error: CoppiceError) -> None:
        self.failure = self.failure or error
        self._transport.pause_reading()  # a guest may send without end
        self._answered.set()
        for stream in list(self._streams.values()):
            stream.fail(self.failure)
        self._streams.clear()

    # ---- keepalives ----

    def _look_later(self) -> None:
        self._next_look = self._loop.call_later(min(PING_AFTER_S, self.patience_s / 3), self._look)

    def _look(self) -> None:
        """Send a PING to a silent guest, which answers it at once. Judge a guest that has been silent for too long."""
        if self.failure is not None:
            return
        silent = self._loop.time() - self._heard
        if self._streams and silent >= self.patience_s:
            self._asking = self._loop.create_task(self._judge(silent))
            return
        if self._streams and silent >= min(PING_AFTER_S, self.patience_s / 3):
            with contextlib.suppress(CoppiceError):
                self.post(encode_frame(FrameType.PING, 0))
        self._look_later()

    async def _judge(self, silent: float) -> None:
        """Fail the streams of a silent guest, unless its machine is paused."""
        if await self.waits_for_resume():
            self._heard = self._loop.time()
            self._look_later()
            return
        self._fail(
            GuestTimeout(
                f"the guest's agent has been silent for {silent:.0f} s",
                hint="see its console with `coppice logs NAME`; a command goes on in a guest that lives",
            )
        )

    async def waits_for_resume(self) -> bool:
        """Return whether the guest is silent because its machine is paused."""
        try:
            return self._is_paused is not None and await self._is_paused()
        except CoppiceError:  # there is no VMM, or it does not answer either
            return False

    def give_up(self, error: CoppiceError) -> None:
        """Close the port. Each wait for the guest, also one that has begun, raises `error`."""
        self._fail(error)
        self._transport.abort()

    async def close(self) -> None:
        """Close the port. Commands go on in the guest, all else ends. Idempotent."""
        self._fail(VmmDied("the connection to the agent was closed", hint="open it again"))
        if self._next_look is not None:
            self._next_look.cancel()
        if self._asking is not None:
            self._asking.cancel()
        # What was sent, such as the end of a command, must still reach the port, to the last byte.
        self._transport.set_write_buffer_limits(high=0)
        try:
            if not self._writable.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_FLUSH_S):
                        await self._writable.wait()
        finally:  # also if the caller is cancelled
            with contextlib.suppress(OSError):
                # Closing is not enough: a child process forked meanwhile would keep the port
                # connected.
                self._socket.shutdown(socket.SHUT_RDWR)
            self._transport.abort()
        await self._ended.wait()
        if self._asking is not None:
            await asyncio.wait({self._asking})


def gone() -> VmmDied:
    """Return the error for a port that was closed at the other end."""
    return VmmDied(
        "the machine closed the connection to its agent",
        hint="see `coppice inspect NAME` and `coppice logs --vmm NAME`, then start it again",
    )
