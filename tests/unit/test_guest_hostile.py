"""A guest that means harm: whatever it answers becomes an error of ours, in time."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from coppice.errors import GuestProtocolError, GuestTimeout, UnsafePath
from coppice.guest.channel import Channel
from coppice.guest.control import Control, Identity
from coppice.guest.copy import copy_out
from coppice.guest.protocol import Frame, FrameType, encode_fields
from coppice.guest.session import Session
from coppice.guest.unpack import unpack
from fakes.wire import Peer

Answer = Callable[[Peer, Frame], Awaitable[None]]


@contextlib.asynccontextmanager
async def talking_to(answer: Answer, patience_s: float) -> AsyncIterator[Channel]:
    """A channel to a guest that answers each request as it likes."""
    ours, theirs = socket.socketpair()

    async def serve() -> None:
        async with Peer.over(theirs) as peer:
            while (frame := await peer.receive()) is not None:
                await answer(peer, frame)

    guest = asyncio.create_task(serve())
    channel = await Channel.over(ours, patience_s)
    try:
        yield channel
    finally:
        await channel.close()
        guest.cancel()
        await asyncio.gather(guest, return_exceptions=True)


async def test_a_guest_that_talks_on_without_an_answer_is_given_up() -> None:
    """Frames that mean nothing are no answer: else it could keep a capture, and the instance's lock, for ever."""

    async def flood(peer: Peer, _: Frame) -> None:
        while True:
            await peer.open_window(1)
            await asyncio.sleep(0.001)

    async with talking_to(flood, 0.2) as channel:
        async with asyncio.timeout(10):
            with pytest.raises(GuestTimeout):
                await Control(channel).freeze(1)


async def test_a_duration_that_no_float_holds_is_left_out() -> None:
    """The steps of an identity are for reports: nonsense among them must not fail a fork, let alone its siblings."""

    async def boast(peer: Peer, _: Frame) -> None:
        await peer.send(FrameType.OK, encode_fields([(1, 7), (2, "clock=" + "9" * 900), (2, "entropy=1500")]))

    async with talking_to(boast, 10) as channel:
        steps = await Control(channel).identity(Identity(serial=7, entropy=bytes(32)))
    assert steps == {"entropy": 1.5}


def test_a_negative_size_does_not_buy_room(tmp_path: Path) -> None:
    """What may be written would grow by it, and the limit be none."""
    member = tarfile.TarInfo("top/file")
    member.size = -(1 << 40)
    with pytest.raises(GuestProtocolError):
        unpack(io.BytesIO(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), tmp_path, "copy", max_bytes=1024)


def test_a_link_with_a_zero_byte_is_unsafe(tmp_path: Path) -> None:
    """The system call would refuse it with an error that is nobody's."""
    record = b"linkpath=a\0b\n"
    length = len(record) + 3
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, length
    link = tarfile.TarInfo("top/deeper/link")
    link.type, link.linkname = tarfile.SYMTYPE, "a"
    data = extended.tobuf() + (b"%d " % length + record).ljust(512, b"\0") + link.tobuf() + bytes(1024)
    with pytest.raises(UnsafePath):
        unpack(io.BytesIO(data), tmp_path, "copy")


async def test_copies_that_hang_leave_the_threads_to_others(tmp_path: Path) -> None:
    """An event loop has a handful of threads for all its work: guests that send nothing must not be able to take them all."""
    started = asyncio.Event()

    async def hang(peer: Peer, frame: Frame) -> None:
        if frame.type == FrameType.FILE_STAT:
            await peer.send(FrameType.OK, encode_fields([(1, "d"), *((tag, 0) for tag in range(2, 7))]))
            return
        assert frame.type == FrameType.TAR_OUT
        started.set()
        await asyncio.Event().wait()

    async with contextlib.AsyncExitStack() as stack:
        copies = []
        for number in range((os.cpu_count() or 1) + 4):
            started.clear()
            channel = await stack.enter_async_context(talking_to(hang, 100))
            copies.append(asyncio.create_task(copy_out(Session(channel), "/etc", tmp_path / f"{number}")))
            await started.wait()
        async with asyncio.timeout(5):
            assert await asyncio.to_thread(tmp_path.exists)
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
