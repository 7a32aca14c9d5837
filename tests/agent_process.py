"""The guest agent as a local process: compiled from source, serving one session over a socket
pair.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from coppice.agent.channel import Channel
from coppice.agent.control import Control
from coppice.agent.session import Session

SOURCE = Path(__file__).parents[1] / "src/coppice/agent/c"
_STATIC = ("-O2", "-static", "-s")
_SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILDS = ("static", "sanitized")
OLDER = "older"
"""The oldest agent of protocol 2 that today's host serves with all operations. Its sources are kept."""
_OLDER_SOURCES = Path(__file__).parent / "data/agent-2.tar.xz"


@functools.cache
def _directory() -> Path:
    # Kept until the process ends; pytest has no hook for a cached value.
    directory = tempfile.TemporaryDirectory(prefix="coppice-agent-")
    _keep.append(directory)
    return Path(directory.name)


_compiling = threading.Lock()
_keep: list[tempfile.TemporaryDirectory[str]] = []


def agent_binary(build: str) -> Path:
    """Compile the agent once per test run. Threads that ask at the same time wait for it."""
    with _compiling:
        return _compiled(build)


@functools.cache
def _compiled(build: str) -> Path:
    if build == OLDER:
        with tarfile.open(_OLDER_SOURCES) as archive:
            archive.extractall(_directory() / OLDER, filter="data")
        sources = _directory() / OLDER / "c"
        return compile_agent(build, sources / "main.c", _STATIC, sources=sources)
    return compile_agent(build, SOURCE / "main.c", _STATIC if build == "static" else _SANITIZED)


def compile_agent(
    name: str,
    main: Path,
    flags: tuple[str, ...] = _SANITIZED,
    *,
    without: tuple[str, ...] = (),
    sources: Path = SOURCE,
) -> Path:
    """Compile the agent's sources with the given main program, and without the files that it includes."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the agent's tests need a C compiler"
    binary = _directory() / f"coppice-agent-{name}"
    files = sorted(str(path) for path in sources.glob("*.c") if path.name not in ("main.c", *without))
    warnings = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
    subprocess.run([compiler, *flags, *warnings, f"-I{sources}", "-o", str(binary), str(main), *files], check=True)
    return binary


def names(directory: Path | str) -> list[str]:
    """Return the names in a directory, sorted."""
    return sorted(path.name for path in Path(directory).iterdir())


class Agent:
    """A running agent; `sock` is the host's end of its port."""

    def __init__(self, sock: socket.socket, process: asyncio.subprocess.Process) -> None:
        self.sock = sock
        self.process = process
        self.killed = False

    def kill(self) -> None:
        """End the session as a dying VMM does."""
        self.killed = True
        self.process.kill()

    def resident_bytes(self) -> int:
        """Return the private memory of the worker."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


@contextlib.asynccontextmanager
async def running_agent(build: str = "static", *, under: Sequence[str] = ()) -> AsyncIterator[Agent]:
    """Run an agent that serves one connection. It must end by itself; sanitizers report through its exit
    code.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *under,
            agent_binary(build),
            "--serve",
            str(theirs.fileno()),
            pass_fds=[theirs.fileno()],
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
async def agent_session(
    build: str = "static", *, patience_s: float = 20.0, under: Sequence[str] = ()
) -> AsyncIterator[Session]:
    """Open a session with a new agent. `under` is a command that starts it, such as `unshare`."""
    async with running_agent(build, under=under) as agent:
        channel = await Channel.over(agent.sock, patience_s)
        try:
            yield Session(channel)
        finally:
            await channel.close()


@contextlib.asynccontextmanager
async def agent_control() -> AsyncIterator[Control]:
    """Open the control port of a new agent, which does nothing that affects the host."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 20.0)
        try:
            yield Control(channel)
        finally:
            await channel.close()
