"""The agent's report of processes whose random generators forks would share."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

import pytest

from agent_process import BUILDS, running_agent
from coppice.agent.channel import Channel
from coppice.agent.control import Control


@pytest.mark.parametrize("build", BUILDS)
async def test_processes_of_one_program_are_one_entry(tmp_path: Path, build: str) -> None:
    """A server has many processes, and one line says what matters about them."""
    program = shutil.which("sleep")
    assert program is not None
    for name in ("php-server", "php-alone", "server"):  # known by the beginning of its name
        shutil.copy(program, tmp_path / name)
    async with contextlib.AsyncExitStack() as stack:
        pids: dict[str, int] = {}
        for name in ("php-server", "php-server", "php-alone", "server", "php-server"):
            process = await asyncio.create_subprocess_exec(tmp_path / name, "1000")
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
            pids.setdefault(name, process.pid)
        async with running_agent(build) as agent:
            channel = await Channel.over(agent.sock, 20.0)
            told = await Control(channel).shared_random()
            await channel.close()
    assert sorted(line for line in told if line.startswith("php-")) == [
        f"php-alone (pid {pids['php-alone']}): mt_rand",
        f"php-server (3 processes, pid {pids['php-server']} ...): mt_rand",
    ]


@pytest.mark.parametrize("build", BUILDS)
async def test_a_report_that_is_cut_says_so(tmp_path: Path, build: str) -> None:
    """The report has room for some programs. Its last line says that there are more."""
    program = shutil.which("sleep")
    assert program is not None
    async with contextlib.AsyncExitStack() as stack:
        for number in range(40):
            path = shutil.copy(program, tmp_path / f"php-{number}-{'x' * 60}")
            process = await asyncio.create_subprocess_exec(path, "1000")
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
        async with running_agent(build) as agent:
            channel = await Channel.over(agent.sock, 20.0)
            told = await Control(channel).shared_random()
            await channel.close()
    assert len(told) == 33
    assert told[-1] == "processes of more programs"
