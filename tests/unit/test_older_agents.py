"""Today's host and older agents: what a recording of each shows, and what an agent without a feature is
refused.
"""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from agent_process import agent_session
from coppice.agent.channel import Channel
from coppice.agent.protocol import LIMITS, Frame, FrameType
from coppice.agent.session import Session
from coppice.errors import CommandNotStarted, GuestRefused, GuestTimeout, NotSupported, VmmDied
from fakes.wire import Peer, talking_to
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
