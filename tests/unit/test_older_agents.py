"""Today's host and older agents: what a recording of each shows, and what an agent without a feature is
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from agent_process import OLDER, agent_session, running_agent
from coppice.agent.channel import Channel
from coppice.agent.control import Control
from coppice.agent.copy import copy_in, copy_out
from coppice.agent.protocol import LIMITS, Frame, FrameType
from coppice.agent.session import Session
from coppice.errors import CommandNotFound, CommandNotStarted, GuestRefused, GuestTimeout, NotSupported, VmmDied
from fakes.wire import Peer, talking_to
from guest_trees import describe, plant
from older_agents import CONVERSATIONS, outcome, replaying

RECORDINGS = sorted((Path(__file__).parents[1] / "data").glob("agent-*.json"))


def _recorded() -> list[Any]:
    return [
        pytest.param(name, each["frames"], each["result"], id=f"{path.stem}-{name}")
        for path in RECORDINGS
        for name, each in json.loads(path.read_text(encoding="ascii")).items()
    ]


@pytest.mark.parametrize(("name", "frames", "result"), _recorded())
async def test_an_older_agent_is_served(name: str, frames: list[Any], result: object) -> None:
    """Today's host sends what the recorded agent needs, and understands its answers as the host of its
    time did.
    """
    async with replaying(frames) as channel:
        assert await outcome(CONVERSATIONS[name], channel) == result


async def test_the_sources_of_an_older_agent_are_served(tmp_path: Path) -> None:
    """The oldest agent of protocol 2 that has all of today's requests, compiled from its kept sources,
    serves each of them to today's host.
    """
    async with running_agent(OLDER) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        session = Session(channel)
        health = await Control(channel).health()
        assert (health.agent_version, channel.protocol, channel.features) == ("2.0.0", 2, frozenset())
        await _commands(session)
        await _files(session, tmp_path)
        await _connections(session, tmp_path)
        with pytest.raises(NotSupported, match="older agent"):
            await session.exec(["true"], processes=9)
        await channel.close()


async def _commands(session: Session) -> None:
    done = await session.exec(["sh", "-c", "cat; echo err >&2; exit 3"], env={"A": "b"}, stdin=bytes(200_000))
    assert (done.stdout, done.stderr, done.exit_code) == (bytes(200_000), b"err\n", 3)
    with pytest.raises(CommandNotFound):
        await session.exec(["/nothing"])
    with pytest.raises(GuestTimeout, match="ran longer than"):
        await session.exec(["sleep", "100"], timeout_s=0.1)
    results = await asyncio.gather(*(session.exec(["echo", str(number)]) for number in range(100)))
    assert [each.stdout for each in results] == [b"%d\n" % number for number in range(100)]
    async with session.exec_stream(["cat"], tty=True, size=(30, 90), command_id="terminal", detached=True):
        pass
    async with session.attach("terminal", stdin=True) as first:
        await first.send_stdin(b"typed\n")
        await first.resize(20, 70)
        await first.eof()
        assert b"".join([data async for _, data in first]).startswith(b"typed\r\n")
    async with session.attach("terminal", offset=2) as again:
        assert b"".join([data async for _, data in again]).startswith(b"ped\r\n")
    assert [(each.id, each.exit_code) for each in await session.commands()] == [("terminal", 0)]
    session.forget("terminal")
    async with session.exec_stream(["sleep", "100"], has_stdin=False, command_id="asleep") as asleep:
        assert (await asleep.terminate()).exit_code == 128 + signal.SIGTERM  # it does not name the signal


async def _files(session: Session, directory: Path) -> None:
    plant(directory / "tree")
    await copy_in(session, directory / "tree", str(directory / "copied"), keep_owners=os.geteuid() == 0)
    assert describe(directory / "copied") == describe(directory / "tree")
    for name in ("pipe", "dangling"):  # a host takes neither from a guest
        await session.remove(str(directory / "copied" / name))
    await copy_out(session, str(directory / "copied"), directory / "back")
    assert describe(directory / "back").keys() == describe(directory / "copied").keys()
    path = str(directory / "made/file")
    await session.make_directory(str(directory / "made"))
    async with contextlib.aclosing(session.watching(str(directory / "made"))) as events:
        assert (await anext(events)).kind == "watching"
        await session.write_file(path, bytes(100_000), mode=0o640)
        assert (await anext(events)).kind == "created"
    assert await session.read_file(path) == bytes(100_000)
    assert (await session.stat(path)).mode == 0o640
    await session.move(path, f"{path}-moved")
    assert [Path(each.path).name async for each in session.listing(str(directory / "made"))] == ["file-moved"]
    await session.remove(str(directory / "made"), recursive=True)


async def _connections(session: Session, directory: Path) -> None:
    async def reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])
        writer.close()

    data = os.urandom(300_000)
    async with await asyncio.start_unix_server(reverse, directory / "server", limit=1 << 20), session.connect(f"unix:{directory}/server") as connection:
        await connection.send(data)
        await connection.eof()
        told = bytearray()
        while chunk := await connection.receive():
            told += chunk
    assert bytes(told) == data[::-1]


async def test_a_command_with_limits_is_refused_by_an_agent_without_them() -> None:
    """An older agent would ignore the limits, and run the command without: nothing is sent to it."""
    asked: list[int] = []

    async def serve(peer: Peer, frame: Frame) -> None:
        asked.append(frame.type)

    async with talking_to(serve, 5.0, features=()) as channel:
        with pytest.raises(NotSupported, match=r"older agent, which has no limits of commands.*--target stopped"):
            await Session(channel).exec(["true"], memory_bytes=1 << 20)
    assert asked == []


async def test_todays_agent_has_the_feature() -> None:
    """Whether its kernel can limit commands is another question, which the agent answers."""
    async with agent_session() as session:
        with pytest.raises(CommandNotStarted, match="limits"):
            await session.exec(["true"], memory_bytes=1 << 20)
        assert session._channel.features == {LIMITS}


@pytest.mark.parametrize(("silent", "error"), [(True, GuestTimeout), (False, VmmDied)])
async def test_asking_for_a_feature_ends(silent: bool, error: type[Exception]) -> None:
    """An agent that never answers the handshake, or hangs up, holds up no caller."""
    ours, theirs = socket.socketpair()
    channel = await Channel.over(ours, 0.2)
    try:
        if not silent:
            theirs.close()
        async with asyncio.timeout(10):
            with pytest.raises(error):
                await channel.require(LIMITS, "limits")
    finally:
        await channel.close()
        theirs.close()


async def test_a_request_that_an_agent_does_not_know_says_what_helps() -> None:
    """A new request needs no feature: an older agent refuses it by itself."""
    async with agent_session() as session:
        with pytest.raises(GuestRefused) as caught:
            await session._channel.call(FrameType.OK)
    assert "older agent" in str(caught.value.hint)
    assert "coppice stop NAME" in str(caught.value.hint)
