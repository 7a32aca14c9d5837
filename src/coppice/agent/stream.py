"""One stream of a connection: a request, the frames that belong to it, and its last frame."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Final

from coppice.agent.hints import hint_for
from coppice.agent.protocol import (
    CREDIT_SIZE,
    WINDOW_SIZE,
    Fields,
    Frame,
    FrameType,
    encode_data,
    encode_frame,
    pack32,
    unpack_number,
)
from coppice.errors import CoppiceError, GuestProtocolError, GuestRefused, GuestTimeout

if TYPE_CHECKING:
    from coppice.agent.channel import Channel

REFUSED: Final = "the guest refused: "
_OTHER_FRAMES: Final = 64  # frames without output that a stream can have
_PIECE: Final = 512  # smaller pieces of output are joined, since each takes more memory than its bytes
_LAST = frozenset({FrameType.OK, FrameType.ERROR, FrameType.EXIT})
_OUTPUT = frozenset({FrameType.STDOUT, FrameType.STDERR, FrameType.DATA})


def deadline(seconds: float | None, waiting_for: str) -> AbstractAsyncContextManager[None]:
    """Limit the block to `seconds`; None sets no limit.

    :raises GuestTimeout: the block did not end in time
    """
    return contextlib.nullcontext() if seconds is None else _deadline(seconds, waiting_for)


@contextlib.asynccontextmanager
async def _deadline(seconds: float, waiting_for: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise GuestTimeout(
            f"the guest did not answer within {seconds:g} s ({waiting_for})",
            hint="see its console with `coppice logs NAME`; "
            "if the host's disk was full, free disk space, then run `coppice restore NAME`",
        ) from error


class RemoteStream:
    """A stream of an agent. It ends with one last frame: OK, ERROR or EXIT."""

    def __init__(self, channel: Channel, stream_id: int, kind: FrameType) -> None:
        self.id = stream_id
        self.kind = kind
        self.window = WINDOW_SIZE  # bytes that may be sent now
        self.begun = False  # a first frame has come
        self.ended = False  # the last frame has come, or the connection has failed
        self._channel = channel
        self._frames: deque[Frame] = deque()
        self._changed = asyncio.Event()
        self._failure: CoppiceError | None = None
        self._abandoned = False
        self._credit = CREDIT_SIZE  # bytes of output that the guest may send
        self._others = _OTHER_FRAMES  # other frames that it may send
        self._taken = 0  # bytes that were taken since the guest last got credit

    # ---- for the channel ----

    def take(self, frame: Frame) -> None:
        """Take over a frame of this stream.

        :raises GuestProtocolError: the guest sent more than it may
        """
        self.begun |= frame.type != FrameType.WINDOW
        if frame.type == FrameType.WINDOW:
            self.window += unpack_number(frame.payload)
        elif frame.type in _LAST:
            self.ended = True
            self._channel.forget(self.id)
            self._frames.append(frame)
        else:
            if frame.type in _OUTPUT and frame.payload:
                self._credit -= len(frame.payload)
            else:
                self._others -= 1
            if not self._abandoned and min(self._credit, self._others) < 0:
                raise GuestProtocolError(
                    "the guest sent more than it may",
                    hint="run `coppice stop NAME`, then `coppice start NAME`",
                )
            if not self._abandoned:
                self._keep(frame)
        self._changed.set()

    def _keep(self, frame: Frame) -> None:
        last = self._frames[-1] if self._frames else None
        if frame.type not in _OUTPUT or last is None or last.type != frame.type or len(last.payload) >= _PIECE:
            self._frames.append(frame)
        else:
            self._frames[-1] = Frame(frame.type, frame.stream, last.payload + frame.payload)

    def fail(self, error: CoppiceError) -> None:
        """End the stream with an error, after the frames that have come."""
        self.ended = True
        self._failure = error
        self._changed.set()

    # ---- receiving ----

    async def receive(self) -> Frame:
        """Return the next frame. The keepalive of the connection limits the wait.

        :raises VmmDied: the machine ended
        :raises GuestTimeout: the guest is silent
        :raises GuestProtocolError: the guest broke the protocol, or the stream's last frame was taken
        """
        if self._taken >= CREDIT_SIZE // 4 and not self.ended:
            await self._grant()
        while not self._frames:
            if self._failure:
                raise self._failure
            if self.ended:
                raise _over()
            self._changed.clear()
            await self._changed.wait()
        frame = self._frames.popleft()
        if frame.type in _OUTPUT:
            self._taken += len(frame.payload)
        return frame

    async def opened(self) -> Frame:
        """Return the first frame, which says whether what was asked for has begun. A paused machine is
        waited for.

        :raises GuestTimeout: it did not come in time, even if frames that mean nothing did
        :raises GuestRefused: the agent answered with an error
        :raises GuestProtocolError: it is another frame than STARTED
        """
        while True:
            try:
                frame = await self._first("it does not say whether it has begun")
            except GuestTimeout:
                if self._failure or not await self._channel.waits_for_resume():
                    raise
            else:
                if frame.type == FrameType.ERROR:
                    self.final(frame)
                if frame.type != FrameType.STARTED:
                    raise unexpected(frame)
                return frame

    async def _first(self, waiting_for: str) -> Frame:
        """Return the first frame. While the guest answers earlier requests, its time begins again: of many at once
        a slow guest answers the last one late. Earlier requests are finite, so the wait is.

        :raises GuestTimeout: it did not come in time
        """
        while True:
            before = self._channel.unanswered_before(self)
            try:
                async with deadline(self._channel.patience_s, waiting_for):
                    return await self.receive()
            except GuestTimeout:
                if self._failure or self._channel.unanswered_before(self) >= before:
                    raise

    async def _grant(self) -> None:
        """Let the guest send as much as was taken. Waits while the guest does not read: otherwise a
        guest that only sends would fill this end's buffer."""
        taken, self._taken = self._taken, 0
        self._credit += taken
        try:
            await self._channel.send(encode_frame(FrameType.WINDOW, self.id, pack32(taken)))
        except CoppiceError:
            if self._failure is None:  # otherwise it is raised after the frames that have come
                raise

    async def reply(self) -> Fields:
        """Return the fields of the last frame, an OK.

        :raises GuestTimeout: it did not come in time, even if other frames did
        :raises GuestRefused: the agent answered with an error
        """
        return self.final(await self._first("no reply"))

    def final(self, frame: Frame, expected: FrameType = FrameType.OK) -> Fields:
        """Return the fields of the last frame.

        :raises GuestRefused: the frame is an error
        :raises GuestProtocolError: the frame has another type than `expected`
        """
        if frame.type == FrameType.ERROR:
            raise refusal(frame, self.kind)
        if frame.type != expected:
            raise unexpected(frame)
        return Fields(frame.payload)

    async def data(self) -> AsyncIterator[bytes]:
        """Yield the contents of DATA frames, until the OK.

        :raises GuestRefused: the agent could not send all of it
        """
        while (frame := await self.receive()).type == FrameType.DATA:
            yield frame.payload
        self.final(frame)

    # ---- sending ----

    async def send(self, kind: FrameType, payload: bytes = b"") -> None:
        """Send one frame, unless the stream has ended."""
        if not self.ended:
            await self._channel.send(encode_frame(kind, self.id, payload))

    async def send_data(self, kind: FrameType, data: bytes | memoryview) -> None:
        """Send data within the window. Data after the end of the stream is dropped."""
        view = memoryview(data)
        while view and not self.ended:
            while self.window == 0 and not self.ended:
                self._changed.clear()
                await self._changed.wait()
            size = min(len(view), self.window)
            self.window -= size
            if not self.ended:
                await self._channel.send(encode_data(kind, self.id, view[:size]))
            view = view[size:]

    async def taken(self) -> None:
        """Wait until the guest has passed on all data that was sent, or the stream has ended."""
        while self.window < WINDOW_SIZE and not self.ended:
            self._changed.clear()
            await self._changed.wait()

    def abandon(self, how: bytes = b"") -> None:
        """Ask the agent to end what the stream shows, and ignore all but its last frame. Idempotent."""
        self._part(FrameType.END, how)

    def leave(self) -> None:
        """Ask the agent to close the stream and to leave the command running. Idempotent."""
        self._part(FrameType.LEAVE)

    def _part(self, kind: FrameType, payload: bytes = b"") -> None:
        if not self.ended and not self._abandoned:
            self._abandoned = True
            self._frames.clear()
            if self._channel.failure is None:
                self._channel.post(encode_frame(kind, self.id, payload))


def refusal(frame: Frame, kind: FrameType | None) -> GuestRefused:
    """Return the error that an ERROR frame stands for."""
    fields = Fields(frame.payload)
    number, reason = fields.integer(1, 0), fields.text(2, "no reason given")
    return GuestRefused(REFUSED + reason, errno=number, hint=hint_for(kind, number, reason))


def _over() -> GuestProtocolError:
    return GuestProtocolError("the request has ended already", hint="report it with the output of `coppice doctor`")


def unexpected(frame: Frame) -> GuestProtocolError:
    """Return the error for a frame whose type does not fit the conversation."""
    return GuestProtocolError(
        f"the guest sent an unexpected frame of type {frame.type}",
        hint="its agent may have another version: run `coppice stop NAME`, then `coppice start NAME`",
    )
