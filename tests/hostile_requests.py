"""What a host asks of a guest, and what an honest agent answers, for the fuzz of the host's side.

OPERATIONS is the one place that lists the host's requests, and `legal` what an honest agent would answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, TypeVar

from coppice.agent.channel import Channel
from coppice.agent.control import Control, Identity
from coppice.agent.copy import copy_in, copy_out
from coppice.agent.protocol import (
    WINDOW_SIZE,
    FrameType,
    Value,
    encode_fields,
    pack32,
)
from coppice.agent.records import Content, End, Entry, Item, write
from coppice.agent.session import Session

T = TypeVar("T")
COLLECTED_MAX: Final = 1 << 20
_BEGIN_S: Final = 20.0


class Choices:
    """Decisions that bytes make. After their end every decision is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """The number of bytes that no decision has used."""
        return len(self._data) - self._at

    def below(self, limit: int) -> int:
        """Return a number from 0 to `limit` - 1, of at most 65535."""
        size = 1 if limit <= 256 else 2
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % limit

    def bytes(self, longest: int) -> bytes:
        """Return up to `longest` bytes of the input itself."""
        size = self.below(longest + 1)
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken


# ---- the host's requests ----

Operation = Callable[[Channel, Choices, Path], Awaitable[object]]


async def _exec(channel: Channel, choices: Choices, _: Path) -> object:
    session = Session(channel)
    return await session.exec(
        ["cat"], stdin=bytes(choices.below(3) * 50_000), timeout_s=5, max_output_bytes=COLLECTED_MAX
    )


@contextlib.asynccontextmanager
async def _begun(opening: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Enter a block that lasts as long as its caller wants. Only its beginning has a limit."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(_BEGIN_S):
                value = await stack.enter_async_context(opening)
        except TimeoutError:
            raise AssertionError("a guest alone keeps a request from its beginning") from None
        yield value


async def _attach(channel: Channel, choices: Choices, _: Path) -> object:
    how = choices.below(8)
    async with _begun(Session(channel).attach("some", output=how != 1, stdin=True)) as running:
        await running.send_stdin(bytes(100_000 if how & 2 else 10))
        if how & 4:
            await running.signal(15)
            await running.resize(24, 80)
            await running.eof()
            return await running.terminate()
        return [len(data) async for _, data in running]


async def _connect(channel: Channel, choices: Choices, _directory: Path) -> None:
    async with _begun(Session(channel).connect(80 if choices.below(2) else "unix:/run/x")) as connection:
        for _ in range(20):
            await connection.send(bytes(choices.below(256) * 100))
            if not await connection.receive():
                break
        await connection.eof()


async def _write(channel: Channel, choices: Choices, _: Path) -> None:
    await Session(channel).write_file("/a/file", bytes(choices.below(4) * 40_000), mode=0o600)


async def _copy_out(channel: Channel, choices: Choices, directory: Path) -> object:
    return await copy_out(Session(channel), "/etc", directory / "copy")


async def _copy_in(channel: Channel, choices: Choices, directory: Path) -> object:
    return await copy_in(Session(channel), directory / "given", "/srv/")


async def _list(channel: Channel, choices: Choices, _: Path) -> None:
    async for _entry in Session(channel).listing("/etc"):
        pass


async def _changes(channel: Channel, choices: Choices, _: Path) -> None:
    async for _event in Session(channel).watching("/etc", recursive=True):
        pass


def _identity(channel: Channel, choices: Choices, _: Path) -> Awaitable[object]:
    clock_ns = 1 if choices.below(2) else None
    return Control(channel).identity(Identity(serial=7, entropy=bytes(32), clock_ns=clock_ns))


def _control(call: Callable[[Control], Awaitable[object]]) -> Operation:
    return lambda channel, *_: call(Control(channel))


def _session(call: Callable[[Session], Awaitable[object]]) -> Operation:
    return lambda channel, *_: call(Session(channel))


OPERATIONS: Final[dict[FrameType, Operation]] = {
    FrameType.HEALTH: _control(lambda control: control.health()),
    FrameType.IDENTITY: _identity,
    FrameType.FREEZE: _control(lambda control: control.freeze(1)),
    FrameType.THAW: _control(lambda control: control.thaw()),
    FrameType.POWEROFF: _control(lambda control: control.poweroff(1)),
    FrameType.SYNC: _control(lambda control: control.sync()),
    FrameType.CLOCK: _control(lambda control: control.acknowledged(7)),
    FrameType.SHARED_RANDOM: _control(lambda control: control.shared_random()),
    FrameType.EXEC: _exec,
    FrameType.ATTACH: _attach,
    FrameType.LIST: _session(lambda session: session.commands()),
    FrameType.FILE_READ: _session(lambda session: session.read_file("/f", max_bytes=COLLECTED_MAX)),
    FrameType.FILE_WRITE: _write,
    FrameType.FILE_STAT: _session(lambda session: session.stat("/f")),
    FrameType.FILE_LIST: _list,
    FrameType.FILE_MKDIR: _session(lambda session: session.make_directory("/d", parents=True)),
    FrameType.FILE_MOVE: _session(lambda session: session.move("/d", "/e")),
    FrameType.FILE_REMOVE: _session(lambda session: session.remove("/e", recursive=True)),
    FrameType.FILE_WATCH: _changes,
    FrameType.TREE_OUT: _copy_out,
    FrameType.TREE_IN: _copy_in,
    FrameType.CONNECT: _connect,
}
"""What a host asks, by its request."""

FOREVER: Final = frozenset({FrameType.EXEC, FrameType.ATTACH, FrameType.CONNECT, FrameType.FILE_READ,
                            FrameType.FILE_WRITE, FrameType.FILE_LIST, FrameType.FILE_REMOVE, FrameType.FILE_WATCH,
                            FrameType.TREE_OUT, FrameType.TREE_IN})  # fmt: skip
"""Requests that last as long as the guest goes on with them: their caller limits them."""


# ---- what an honest agent answers ----


def _records() -> bytes:
    made = io.BytesIO()
    items: list[Item] = [
        Entry("etc", "d", 0o755),
        Entry("etc/file", "f", size=700),
        Content(0, bytes(300)),
        Content(600, bytes(100)),
        End(700),
        Entry("etc/" + "long" * 30, "l", link="file"),
        Entry("etc/hard", "h", link="etc/file"),
    ]
    write(items, made)
    return made.getvalue()


def _record(kind: int, fields: Iterable[tuple[int, Value]]) -> bytes:
    payload = encode_fields(fields)
    return struct.pack("<BI", kind, len(payload)) + payload


_RECORDS: Final = _records()
_STATUS: Final[list[tuple[int, Value]]] = [(1, "d"), *((tag, 3) for tag in range(2, 7))]
_LISTED: Final = _record(1, [(8, "name"), *_STATUS]) * 3 + _record(4, [])
_COMMAND: Final[list[tuple[int, Value]]] = [
    (1, "some"),
    *((tag, 5) for tag in (2, 3, 4, 6, 7, 8)),
    (10, "cat"),
    (9, encode_fields([(1, 0)])),
    (11, 9),
]


def legal(request: FrameType, choices: Choices) -> list[tuple[FrameType, bytes]]:
    """Return the frames with which an honest agent answers a request."""
    ok = (FrameType.OK, b"")
    started = (FrameType.STARTED, encode_fields([(1, 9), (2, WINDOW_SIZE), (3, 0)]))
    ended = (FrameType.EXIT, encode_fields([(1, choices.below(256)), (2, choices.below(4))]))
    data = (FrameType.DATA, bytes(choices.below(4) * 9000))
    match request:
        case FrameType.HEALTH:
            return [(FrameType.OK, encode_fields([(1, 5), (2, 7 * choices.below(2)), (3, "2.0"), (7, 1)]))]
        case FrameType.IDENTITY:
            return [(FrameType.OK, encode_fields([(1, 7), (2, "clock=12"), (3, 12)]))]
        case FrameType.CLOCK | FrameType.SHARED_RANDOM:
            return [(FrameType.OK, encode_fields([(1, 1 << 60)]))]
        case FrameType.EXEC | FrameType.ATTACH:
            return [
                started,
                (FrameType.STDOUT, data[1]),
                (FrameType.STDERR, b"e"),
                (FrameType.WINDOW, pack32(WINDOW_SIZE)),
                ended,
            ]
        case FrameType.LIST:
            return [(FrameType.DATA, encode_fields([(1, encode_fields(_COMMAND))] * choices.below(9))), ok]
        case FrameType.FILE_READ:
            return [data, data, (FrameType.OK, encode_fields([(1, 2 * len(data[1]))]))]
        case FrameType.FILE_STAT:
            return [(FrameType.OK, encode_fields(_STATUS))]
        case FrameType.TREE_OUT:
            return [(FrameType.DATA, _RECORDS[:200]), (FrameType.DATA, _RECORDS[200:]), ok]
        case FrameType.FILE_LIST:
            return [(FrameType.DATA, _LISTED[:9]), (FrameType.DATA, _LISTED[9:]), ok]
        case FrameType.FILE_WATCH:
            return [
                (FrameType.DATA, _record(5, [(11, 0)])),
                (FrameType.DATA, _record(5, [(11, 0x100), (8, "name")])),
                ok,
            ]
        case FrameType.TREE_IN:
            return [(FrameType.WINDOW, pack32(WINDOW_SIZE)), (FrameType.OK, encode_fields([(1, 3), (2, 9)]))]
        case FrameType.CONNECT:
            return [(FrameType.STARTED, b""), data, (FrameType.DATA_EOF, b""), ok]
        case _:
            return [ok]
