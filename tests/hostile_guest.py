"""A hostile guest that a string of bytes directs, and the requests of a host against it.

`play` is one case: what the guest does, and which requests the host has open meanwhile, follows from
the bytes alone, so a failure can be repeated and shrunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from coppice.agent.channel import Channel
from coppice.agent.protocol import (
    CREDIT_SIZE,
    END_BYTE,
    MAGIC,
    NONCE_SIZE,
    REQUEST_MAX,
    VERSION,
    Frame,
    FrameType,
    encode_fields,
    pack32,
)
from coppice.errors import CoppiceError
from hostile_requests import FOREVER, OPERATIONS, Choices, legal

PATIENCE_S: Final = 3.0
GUEST_PAYLOAD_MAX: Final = 65535
LIMIT_S: Final = 60.0  # for everything that the guest alone must not be able to prolong
QUEUED_MAX: Final = 4096
"""Frames that one stream may hold: the credit, in pieces that are not tiny."""
_HEADER = struct.Struct("<BHH")


# ---- the guest ----


class _Stream(NamedTuple):
    id: int
    request: FrameType
    answer: list[tuple[FrameType, bytes]]  # what an honest agent would still send


class Guest:
    """The guest's end of a connection. It reads what the host sends, unless it stops to read."""

    def __init__(self, sock: socket.socket, choices: Choices) -> None:
        self._sock = sock
        self._choices = choices
        self._temper = (0, 1, 4, 16)[choices.below(4)]  # of 16 steps so many are not an honest agent's
        self._ending = choices.below(5)
        self._buffer = bytearray()
        self._hello = b""
        self._streams: dict[int, _Stream] = {}
        self._reads = asyncio.Event()
        self._reads.set()
        self._heard = asyncio.Event()

    # ---- from the host ----

    async def read(self) -> None:
        """Take the host's frames, until the end of the connection."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._sock, 1 << 16):
                self._buffer += data
                self._take()
                await self._reads.wait()

    def _take(self) -> None:
        if not self._hello:
            at = self._buffer.find(MAGIC)
            if at < 0 or len(self._buffer) < at + len(MAGIC) + NONCE_SIZE:
                return
            self._hello = bytes(self._buffer[at : at + len(MAGIC) + NONCE_SIZE])
            del self._buffer[: at - _HEADER.size]
        while len(self._buffer) >= _HEADER.size:
            kind, stream, size = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + size
            if len(self._buffer) <= end:
                break
            assert self._buffer[end] == END_BYTE, "the host sent a malformed frame"
            if kind in OPERATIONS:
                self._streams[stream] = _Stream(stream, FrameType(kind), legal(FrameType(kind), self._choices))
                self._heard.set()
            del self._buffer[: end + 1]

    # ---- to the host ----

    async def act(self) -> None:
        """Do what the bytes say, to their end."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(2 * PATIENCE_S):
                await self._heard.wait()
            if self._choices.below(16) >= self._temper // 16:
                about = encode_fields([(1, "x"), (2, VERSION)])
                await self._write(FrameType.HELLO_ACK, 0, self._hello + about)
            while self._choices.left > 0:
                await self._step()
            await self._last()

    async def _step(self) -> None:
        choices = self._choices
        if choices.below(16) >= self._temper:
            await self._answer(honest=True)
            return
        match choices.below(12):
            case 0 | 1 | 2:
                await self._answer(honest=False)
            case 3:
                await self._write(self._payload_type(), self._some_stream(), choices.bytes(200))
            case 4:
                await self._bytes(choices.bytes(200))
            case 5 | 6:
                frame = self._frame(self._payload_type(), self._some_stream(), choices.bytes(8))
                await self._bytes(frame * (1 + choices.below(20_000)))
            case 7:
                await self._write(
                    self._payload_type(), self._some_stream(), bytes(choices.below(GUEST_PAYLOAD_MAX + 1))
                )
            case 8:
                await self._write(FrameType.WINDOW, self._some_stream(), choices.bytes(8))
            case 9:
                await asyncio.sleep(choices.below(256) / 100)
            case 10:
                self._reads.clear() if choices.below(4) == 0 else self._reads.set()
            case _:
                await self._write(FrameType.HELLO_ACK, 0, self._hello + choices.bytes(40))

    def _payload_type(self) -> int:
        known = (FrameType.DATA, FrameType.STDOUT, FrameType.DROPPED, FrameType.STARTED, FrameType.OK, FrameType.ERROR,
                 FrameType.EXIT, FrameType.DATA_EOF, FrameType.WINDOW, FrameType.PONG)  # fmt: skip
        which = self._choices.below(len(known) + 2)
        return known[which] if which < len(known) else 1 + self._choices.below(255)

    def _some_stream(self) -> int:
        if self._streams and self._choices.below(16):
            return list(self._streams)[self._choices.below(len(self._streams))]
        return self._choices.below(65536) if self._choices.below(2) else 0

    async def _answer(self, *, honest: bool) -> None:
        """Send the next frame of an honest answer; if not `honest`, change it."""
        if not self._streams:
            await asyncio.sleep(0)
            return
        stream = list(self._streams.values())[self._choices.below(len(self._streams))]
        if not stream.answer:
            del self._streams[stream.id]
            return
        kind, payload = stream.answer.pop(0)
        if not honest:
            payload = self._changed(payload)
        await self._write(kind, stream.id, payload)

    def _changed(self, payload: bytes) -> bytes:
        """Change some bytes, cut the payload, or repeat a part of it."""
        changed = bytearray(payload)
        for _ in range(1 + self._choices.below(4)):
            at = self._choices.below(len(changed) + 1) if changed else 0
            match self._choices.below(4):
                case 0:
                    changed[at : at + 1] = bytes((self._choices.below(256),))
                case 1:
                    del changed[at : at + 1 + self._choices.below(16)]
                case 2:
                    changed[at:at] = changed[at : at + self._choices.below(100)]
                case _:
                    changed[at : at + 8] = self._choices.bytes(8)
        return bytes(changed[:GUEST_PAYLOAD_MAX])

    @staticmethod
    def _frame(kind: int, stream: int, payload: bytes) -> bytes:
        return _HEADER.pack(kind, stream, len(payload)) + payload + bytes((END_BYTE,))

    async def _write(self, kind: int, stream: int, payload: bytes) -> None:
        await self._bytes(self._frame(kind, stream, payload))

    async def _bytes(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def _last(self) -> None:
        """Hang up, be silent, or go on for ever: with frames that say nothing, or with data."""
        match self._ending:
            case 0:
                self._sock.shutdown(socket.SHUT_RDWR)
            case 1:
                await asyncio.Event().wait()
            case 2:
                while True:
                    await self._write(FrameType.PONG, 0, b"")
                    for stream_id in self._streams:
                        await self._write(FrameType.WINDOW, stream_id, pack32(1))
                    await asyncio.sleep(PATIENCE_S * 0.8)
            case 3:
                while True:
                    for stream_id in self._streams:
                        await self._write(FrameType.DATA, stream_id, bytes(60_000))
                    await asyncio.sleep(PATIENCE_S * 0.8)
            case _:
                for stream in list(self._streams.values()):
                    for kind, payload in stream.answer:
                        await self._write(kind, stream.id, payload)
                self._sock.shutdown(socket.SHUT_WR)


# ---- a case ----


async def play(data: bytes, directory: Path, outcomes: Counter[str]) -> None:
    """Have the host make one to four requests of a guest that the bytes direct.

    Each must end in time, with a result or an error of the tree; nothing may be left, and no buffer
    may grow beyond the protocol's windows.
    """
    choices = Choices(data)
    kinds = list(OPERATIONS)
    asked = [kinds[choices.below(len(kinds))] for _ in range(1 + choices.below(4))]
    before = asyncio.all_tasks()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        channel = await Channel.over(ours, PATIENCE_S)
        guest = Guest(theirs, choices)
        hostile = [asyncio.create_task(guest.read()), asyncio.create_task(guest.act())]
        watcher = asyncio.create_task(_watch(channel))
        try:
            answers = [_asked(kind, channel, choices, directory, outcomes) for kind in asked]
            await asyncio.gather(*answers)
        finally:
            _check_bounds(channel)
            async with asyncio.timeout(LIMIT_S):
                await channel.close()
            for task in (*hostile, watcher):
                task.cancel()
            ended = await asyncio.gather(*hostile, watcher, return_exceptions=True)
    for error in ended:
        if error is not None and not isinstance(error, asyncio.CancelledError | TimeoutError):
            raise error
    assert asyncio.all_tasks() == before, "a task was left"
    assert not channel._streams


async def _asked(kind: FrameType, channel: Channel, choices: Choices, directory: Path, outcomes: Counter[str]) -> None:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    try:
        async with asyncio.timeout(LIMIT_S / 2 if kind in FOREVER else None):
            await OPERATIONS[kind](channel, choices, directory)
        outcome = "ended"
    except CoppiceError as error:
        outcome = type(error).__name__ + ("" if error.hint else " without a hint")
    except TimeoutError:
        if kind not in FOREVER:
            raise
        outcome = "given up"
    assert loop.time() - begin <= LIMIT_S, f"{kind.name} took {loop.time() - begin:.0f} s"
    outcomes[f"{kind.name} {outcome}"] += 1


async def _watch(channel: Channel) -> None:
    """Check the bounds while the case lasts."""
    while True:
        _check_bounds(channel)
        await asyncio.sleep(0.3)


def _check_bounds(channel: Channel) -> None:
    assert len(channel._decoder._buffer) <= 2 * (GUEST_PAYLOAD_MAX + 6), "the decoder keeps too much"
    assert channel._transport.get_write_buffer_size() <= 2 * REQUEST_MAX, "the host queues too much"
    for stream in channel._streams.values():
        held = sum(len(frame.payload) for frame in stream._frames)
        assert held <= CREDIT_SIZE + GUEST_PAYLOAD_MAX, f"{stream.kind.name} holds {held} bytes"
        assert len(stream._frames) <= QUEUED_MAX, (
            f"{stream.kind.name} holds {len(stream._frames)} frames of {_kinds(stream._frames)}"
        )


def _kinds(frames: Iterable[Frame]) -> dict[int, int]:
    return dict(Counter(frame.type for frame in frames))


@contextlib.contextmanager
def playground() -> Iterator[Path]:
    """Make a directory for the copies of cases."""
    with tempfile.TemporaryDirectory(prefix="coppice-fuzz-") as name:
        directory = Path(name)
        (directory / "given").mkdir()
        (directory / "given/file").write_bytes(bytes(1000))
        yield directory


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
