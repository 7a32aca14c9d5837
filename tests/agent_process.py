"""The guest agent as a process of this machine: compiled from its source, serving one session over a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from coppice.guest.channel import Channel
from coppice.guest.control import Control
from coppice.guest.session import Session

SOURCE = Path(__file__).parents[1] / "src/coppice/guest/agent"
_STATIC = ("-O2", "-static", "-s")
_SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILDS = ("static", "sanitized")


@functools.cache
def _directory() -> Path:
    # Kept until the end of the process; pytest has no hook for a cached value.
    directory = tempfile.TemporaryDirectory(prefix="coppice-agent-")
    _keep.append(directory)
    return Path(directory.name)


_keep: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def agent_binary(build: str) -> Path:
    """Compile the agent once per test run."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the agent's tests need a C compiler"
    binary = _directory() / f"coppice-agent-{build}"
    sources = sorted(str(path) for path in SOURCE.glob("*.c"))
    flags = _STATIC if build == "static" else _SANITIZED
    subprocess.run([compiler, *flags, "-Wall", "-Wextra", "-Werror", "-o", str(binary), *sources], check=True)
    return binary


def names(directory: Path | str) -> list[str]:
    """What is in a directory, sorted."""
    return sorted(path.name for path in Path(directory).iterdir())


class Agent:
    """A running agent; `sock` is the host's end of its port."""

    def __init__(self, sock: socket.socket, process: asyncio.subprocess.Process) -> None:
        self.sock = sock
        self.process = process
        self.killed = False

    def kill(self) -> None:
        """End it as a VMM that dies would."""
        self.killed = True
        self.process.kill()

    def resident_bytes(self) -> int:
        """Memory of its own that the worker holds now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


@contextlib.asynccontextmanager
async def running_agent(build: str = "static", *, control: bool = False) -> AsyncIterator[Agent]:
    """An agent that serves one port; at the end it must leave by itself and in health (the sanitizers say so by the exit code)."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            agent_binary(build), "--control" if control else "--serve", str(theirs.fileno()), pass_fds=[theirs.fileno()]
        )
    agent = Agent(ours, process)
    try:
        yield agent
    finally:
        ours.close()
        try:
            async with asyncio.timeout(10):
                code = await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
    assert code == 0 or agent.killed


@contextlib.asynccontextmanager
async def agent_session(build: str = "static", *, patience_s: float = 20.0) -> AsyncIterator[Session]:
    """A session with a fresh agent."""
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, patience_s)
        try:
            yield Session(channel)
        finally:
            await channel.close()


@contextlib.asynccontextmanager
async def agent_control() -> AsyncIterator[Control]:
    """The control port of a fresh agent, which does only what harms nobody."""
    async with running_agent(control=True) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        try:
            yield Control(channel)
        finally:
            await channel.close()
