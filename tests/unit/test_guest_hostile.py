"""A hostile guest: any answer becomes one of Coppice's errors, in time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from coppice.agent.control import Control, Identity
from coppice.agent.copy import copy_out
from coppice.agent.protocol import Frame, FrameType, encode_fields
from coppice.agent.session import Session
from coppice.errors import GuestRefused, GuestTimeout
from fakes.wire import Peer, talking_to


async def test_a_guest_that_never_answers_is_a_timeout() -> None:
    """Meaningless frames do not count as an answer: otherwise a guest could hold up a capture, and
    the instance's lock, forever.
    """

    async def flood(peer: Peer, frame: Frame) -> None:
        while True:
            await peer.open_window(frame.stream, 1)
            await asyncio.sleep(0.001)

    async with talking_to(flood, 0.2) as channel:
        async with asyncio.timeout(10):
            with pytest.raises(GuestTimeout):
                await Control(channel).freeze(1)


@pytest.mark.parametrize("kind", [FrameType.EXEC, FrameType.ATTACH, FrameType.CONNECT])
async def test_a_guest_that_chatters_and_never_begins_is_a_timeout(kind: FrameType) -> None:
    """A keepalive would not notice it: the guest is not silent. A paused machine is waited for."""
    asked_twice = asyncio.Event()
    pauses = iter((True, False))

    async def is_paused() -> bool:
        paused = next(pauses)
        if not paused:
            asked_twice.set()
        return paused

    async def chatter(peer: Peer, frame: Frame) -> None:
        while True:
            await peer.open_window(frame.stream, 1)
            await peer.send(FrameType.PONG, 0)
            await asyncio.sleep(0.001)

    async def ask(session: Session) -> None:
        match kind:
            case FrameType.EXEC:
                await session.exec(["cat"])
            case FrameType.ATTACH:
                async with session.attach("some"):
                    pass
            case _:
                async with session.connect(80):
                    pass

    async with talking_to(chatter, 0.2, is_paused=is_paused) as channel, asyncio.timeout(20):
        with pytest.raises(GuestTimeout, match="has begun"):
            await ask(Session(channel))
    assert asked_twice.is_set()


async def test_an_invalid_number_is_ignored() -> None:
    """The steps of an identity and the end of the process are only for reports: a nonsensical number must
    not fail a fork or its siblings.
    """

    async def boast(peer: Peer, frame: Frame) -> None:
        await peer.send(
            FrameType.OK,
            frame.stream,
            encode_fields(
                [(1, 7), (2, "clock=" + "9" * 900), (2, "entropy=1500"), *((tag, 2**64 - 1) for tag in (5, 8, 9))]
            ),
        )

    async with talking_to(boast, 10) as channel:
        taken = await Control(channel).identity(Identity(serial=7, entropy=bytes(32)))
    assert taken.steps_ms == {"entropy": 1.5}
    assert taken.process_end is not None
    assert (taken.process_end.exit_code, taken.process_end.signal) == (255, None)


async def test_hanging_copies_do_not_occupy_all_threads(tmp_path: Path) -> None:
    """An event loop has a few threads for all its work: guests that send nothing must not occupy
    them all.
    """
    started = asyncio.Event()

    async def hang(peer: Peer, frame: Frame) -> None:
        if frame.type == FrameType.FILE_STAT:
            await peer.send(FrameType.OK, frame.stream, encode_fields([(1, "d"), *((tag, 0) for tag in range(2, 7))]))
            return
        assert frame.type == FrameType.TREE_OUT
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


@pytest.mark.parametrize("answered", [12, 7])
async def test_a_slow_guest_has_time_for_each_request(answered: int) -> None:
    """Of many requests at once the last is answered long after its patience. One that is never answered is a timeout, as
    soon as nothing before it is answered either: also while the guest goes on with later requests.
    """
    asked: asyncio.Queue[tuple[Peer, Frame]] = asyncio.Queue()

    async def keep(peer: Peer, frame: Frame) -> None:
        if frame.type == FrameType.HEALTH:
            await peer.send(FrameType.OK, frame.stream)
        elif frame.type == FrameType.FILE_STAT:
            asked.put_nowait((peer, frame))

    async def answer_slowly() -> None:
        for _ in range(answered):
            peer, frame = await asked.get()
            await asyncio.sleep(0.15)
            await peer.send(FrameType.ERROR, frame.stream, encode_fields([(1, errno.ENOENT), (2, "nothing")]))

    async with talking_to(keep, 0.4) as channel, asyncio.timeout(30):

        async def ask_others(until: asyncio.Future[Any]) -> None:
            while not until.done():
                await channel.call(FrameType.HEALTH)

        session = Session(channel)
        asking = asyncio.gather(*(session.stat("/nothing") for _ in range(12)), return_exceptions=True)
        await asyncio.sleep(0)
        errors, *_ = await asyncio.gather(asking, answer_slowly(), ask_others(asking))
    assert [type(error) for error in errors] == [GuestRefused] * answered + [GuestTimeout] * (12 - answered)
