"""The machine's process, as the agent knows it: a command that is never forgotten, with its end in each report."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator

import pytest

from agent_process import BUILDS, running_agent
from coppice.agent.channel import Channel
from coppice.agent.control import Control
from coppice.agent.session import Session
from coppice.commands import PROCESS
from coppice.errors import CommandNotStarted, NotFound
from coppice.model.guest import GuestCommand


@contextlib.asynccontextmanager
async def agent_with(
    monkeypatch: pytest.MonkeyPatch, script: str, build: str = "static"
) -> AsyncIterator[tuple[Session, Control]]:
    """An agent whose machine's process is a shell script."""
    monkeypatch.setenv("COPPICE_AGENT_PROCESS", script)
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        try:
            yield Session(channel), Control(channel)
        finally:
            await channel.close()


async def listed(session: Session) -> GuestCommand:
    (found,) = [each for each in await session.commands() if each.id == PROCESS]
    return found


@pytest.mark.parametrize("build", BUILDS)
async def test_its_exit_status_is_told_to_whoever_waits(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    """At once, and in each later report and list."""
    async with agent_with(monkeypatch, "exit 3", build) as (
        session,
        control,
    ):
        async with asyncio.timeout(20), session.attach(PROCESS, output=False) as running:
            ended = await running.wait()
        assert (ended.exit_code, ended.signal) == (3, None)
        health = await control.health()
        assert health.process_pid == running.pid
        assert health.process_end is not None
        assert (health.process_end.exit_code, health.process_end.signal) == (3, None)
        assert abs(health.process_end.at - time.time()) < 60
        assert (await listed(session)).exit_code == 3


async def test_a_signal_that_ended_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a signal reaches it as it reaches a command."""
    async with agent_with(monkeypatch, "while :; do sleep 100; done") as (session, control):
        assert (await control.health()).process_end is None
        assert (await listed(session)).exit_code is None
        async with asyncio.timeout(20), session.attach(PROCESS, output=False) as running:
            await running.signal(signal.SIGKILL)
            ended = await running.wait()
        assert (ended.exit_code, ended.signal) == (128 + signal.SIGKILL, signal.SIGKILL)
        end = (await control.health()).process_end
        assert end is not None
        assert (end.exit_code, end.signal) == (128 + signal.SIGKILL, signal.SIGKILL)


async def test_an_end_reaches_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a command: SIGTERM, then SIGKILL."""
    async with agent_with(monkeypatch, "trap '' TERM; sleep 1000 & wait; wait") as (session, _):
        async with asyncio.timeout(20), session.attach(PROCESS, output=False) as running:
            ended = await running.terminate()
        assert ended.signal == signal.SIGKILL


@pytest.mark.parametrize("build", BUILDS)
async def test_it_is_never_forgotten(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    """Neither by FORGET, nor by an END, nor because of a hundred later commands. Its id is taken."""
    async with agent_with(monkeypatch, "exit 7", build) as (session, control):
        async with asyncio.timeout(60):
            async with session.attach(PROCESS, output=False) as running:
                await running.wait()
            session.forget(PROCESS)
            for _ in range(100):
                await session.exec(["true"])
            for number in range(70):
                async with session.exec_stream(["true"], command_id=f"c{number}", detached=True):
                    pass
            async with session.attach("c69") as last:
                await last.wait()
            assert (await listed(session)).exit_code == 7
            with pytest.raises(CommandNotStarted):
                await _start(session)
        assert (await control.health()).process_end is not None


async def _start(session: Session) -> None:
    async with session.exec_stream(["true"], command_id=PROCESS):
        pass


async def test_a_machine_without_a_process_has_no_such_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also then nobody else gets its id."""
    monkeypatch.delenv("COPPICE_AGENT_PROCESS", raising=False)
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 20.0)
        session = Session(channel)
        with pytest.raises(NotFound):
            async with session.attach(PROCESS):
                pass
        with pytest.raises(CommandNotStarted):
            await _start(session)
        health = await Control(channel).health()
        assert (health.process_pid, health.process_end) == (None, None)
        await channel.close()
