"""A fuzz of the host's side of the agent protocol: for any guest each request ends in time, with a
result or an error of the tree, within bounds, and leaves nothing. `make fuzz` runs many more.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz
from coppice.agent.channel import Channel
from coppice.agent.control import Control
from coppice.agent.copy import with_thread
from coppice.agent.protocol import (
    WINDOW_SIZE,
    Frame,
    FrameType,
    encode_fields,
)
from coppice.agent.session import Session
from coppice.errors import GuestProtocolError, GuestRefused, GuestTimeout
from fakes.wire import Answer, Peer, talking_to
from hostile_guest import GUEST_PAYLOAD_MAX, play, playground
from hostile_requests import OPERATIONS
from warped_loop import run_warped

_OF_A_STREAM = {"PART", "OK", "ERROR", "STDIN", "STDIN_EOF", "SIGNAL", "RESIZE", "LEAVE", "END", "STARTED", "STDOUT",
                "STDERR", "WINDOW", "EXIT", "DROPPED", "DATA", "DATA_EOF"}  # fmt: skip
_OF_THE_CONNECTION = {"HELLO", "HELLO_ACK", "PING", "PONG", "FORGET"}


def test_every_request_is_fuzzed() -> None:
    """A new request needs a line in OPERATIONS."""
    assert {kind.name for kind in OPERATIONS} == {kind.name for kind in FrameType} - _OF_A_STREAM - _OF_THE_CONNECTION


def test_random_guests() -> None:
    """The same random guests in every run."""
    outcomes = fuzz.host(inputs=400, seed=0)
    for kind in OPERATIONS:
        assert outcomes[f"{kind.name} ended"], f"no {kind.name} of an honest guest ended well"
        assert outcomes[f"{kind.name} GuestProtocolError"]
    assert not [outcome for outcome in outcomes if outcome.endswith("without a hint")]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.binary(min_size=20, max_size=600))
def test_guests_of_hypothesis(data: bytes) -> None:
    """Hypothesis looks for other guests than a random generator, and shrinks what it finds."""
    with playground() as directory:
        run_warped(play(data, directory, Counter()))


def test_random_bytes_are_decoded() -> None:
    """The decoder survives frames with changed bytes, in chunks of any size."""
    fuzz.decoder(inputs=20_000, seed=0)


# ---- what it found ----


@contextlib.asynccontextmanager
async def _requested(answer: Answer, patience_s: float = 20.0) -> AsyncIterator[Channel]:
    async with talking_to(answer, patience_s) as channel, asyncio.timeout(20):
        yield channel


async def _until(ended: Callable[[], bool]) -> None:
    """Let the connection's own tasks run; the caller has a deadline."""
    while not ended():  # noqa: ASYNC110 - what comes in while nobody waits for it has no event
        await asyncio.sleep(0.001)


async def test_tiny_pieces_of_output_are_joined() -> None:
    """A frame takes more memory than its bytes: a guest that sends single bytes, or none, cannot make the
    host hold hundreds of thousands of frames.
    """

    async def drip(peer: Peer, frame: Frame) -> None:
        if frame.type == FrameType.ATTACH:
            await peer.send(FrameType.STARTED, frame.stream, encode_fields([(1, 1), (2, 0), (3, 0)]))
            for _ in range(20_000):
                await peer.send(FrameType.STDOUT, frame.stream, b"x")
            await peer.send(FrameType.EXIT, frame.stream, encode_fields([(1, 0)]))

    async with _requested(drip) as channel, Session(channel).attach("some") as running:
        await _until(lambda: running._stream.ended)
        assert len(running._stream._frames) < 100
        assert b"".join([data async for _, data in running]) == b"x" * 20_000


@pytest.mark.parametrize("kind", [FrameType.STDOUT, FrameType.STARTED, FrameType.DATA_EOF])
async def test_a_flood_of_frames_without_data_is_refused(kind: FrameType) -> None:
    """Frames without data use up no window, so there is a limit of their own for them."""

    async def flood(peer: Peer, frame: Frame) -> None:
        for _ in range(1000):
            await peer.send(kind, frame.stream)

    async with _requested(flood) as channel:
        stream = await channel.open(FrameType.FILE_READ)
        await _until(lambda: channel.failure is not None)
        assert len(stream._frames) < 100


@pytest.mark.parametrize(("size", "error"), [(60_000, GuestProtocolError), (1, GuestTimeout)])
async def test_an_endless_list_is_refused(size: int, error: type[Exception]) -> None:
    """A guest that lists commands without end fills no memory and holds up no caller."""

    async def boast(peer: Peer, frame: Frame) -> None:
        while True:
            await peer.write(FrameType.DATA, frame.stream, bytes(size))
            await asyncio.sleep(0 if size > 1 else 0.01)

    async with _requested(boast, patience_s=20.0 if size > 1 else 0.2) as channel:
        with pytest.raises(error):
            await Session(channel).commands()


async def test_waiting_again_after_a_refusal_ends() -> None:
    """Nothing comes after the last frame of a stream: another wait for it is an error, not a hang."""

    async def refuse(peer: Peer, frame: Frame) -> None:
        if frame.type == FrameType.ATTACH:
            await peer.send(FrameType.STARTED, frame.stream, encode_fields([(1, 1), (2, 0), (3, 0)]))
            await peer.send(FrameType.ERROR, frame.stream, encode_fields([(1, 5), (2, "broken")]))

    async with _requested(refuse) as channel, Session(channel).attach("some") as running:
        with pytest.raises(GuestRefused):
            await running.wait()
        with pytest.raises(GuestProtocolError, match="has ended"):
            await running.terminate()


async def test_a_guest_that_only_sends_does_not_fill_the_hosts_buffer() -> None:
    """The host answers data with more credit. A guest that never reads it gets no more, and is given up."""
    handed_over = asyncio.Event()

    async def ignore(peer: Peer, frame: Frame) -> None:
        await peer.send(FrameType.WINDOW, frame.stream, (1 << 20).to_bytes(4, "little"))
        await handed_over.wait()
        for _ in range(16):
            await peer.write(FrameType.DATA, frame.stream, bytes(GUEST_PAYLOAD_MAX))
        await asyncio.Event().wait()  # it reads nothing

    async with _requested(ignore, patience_s=0.5) as channel:
        stream = await channel.open(FrameType.CONNECT)
        with pytest.raises(GuestTimeout):
            await stream.send_data(FrameType.DATA, bytes(WINDOW_SIZE + (1 << 20)))
        held = channel._transport.get_write_buffer_size()
        handed_over.set()
        with pytest.raises((GuestTimeout, GuestProtocolError)):
            async for _ in stream.data():
                pass
        assert channel._transport.get_write_buffer_size() - held < 100


async def test_a_second_cancellation_leaves_no_thread_behind() -> None:
    """A copy that is cancelled again while it waits for its thread still waits for it."""
    began, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work(stream: BinaryIO) -> None:
        loop.call_soon_threadsafe(began.set)
        release.wait(20)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    copying = asyncio.create_task(with_thread(talk, work))
    await began.wait()
    for _ in range(3):
        copying.cancel()
        await asyncio.wait({copying}, timeout=0.05)  # an absence has no event to await
        assert not copying.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await copying


def test_a_silent_guest_is_given_up() -> None:
    """The loop of these tests itself: its clock jumps to the end of the patience."""

    async def main() -> None:
        async def nothing(peer: Peer, frame: Frame) -> None:
            await asyncio.Event().wait()

        async with talking_to(nothing, 1000.0) as channel:
            with pytest.raises(GuestTimeout):
                await Control(channel).thaw()

    run_warped(main())
