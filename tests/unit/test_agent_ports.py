"""Agent ports: one host per port, whoever it is and however it ends; and any length of path."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_process import agent_binary
from coppice.errors import Busy, VmmDied
from coppice.guest.client import AgentPorts, vsock_ports


@contextlib.asynccontextmanager
async def listening(directory: Path, name: str, handshake: bool = False, control: bool = False) -> AsyncIterator[None]:
    """A VMM's port: each connection is an agent's."""
    agents: list[asyncio.subprocess.Process] = []

    async def serve(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            with connection:
                if handshake:
                    line = await loop.sock_recv(connection, 100)
                    if line != b"CONNECT 1025\n":
                        continue
                    await loop.sock_sendall(connection, b"OK 4711\n")
                connection.setblocking(True)
                agents.append(
                    await asyncio.create_subprocess_exec(
                        agent_binary("static"),
                        "--control" if control else "--serve",
                        str(connection.fileno()),
                        pass_fds=[connection.fileno()],
                    )
                )

    with socket.socket(socket.AF_UNIX) as listener:
        # A relative name: the directory's path may be too long for an address.
        handle = directory.joinpath(name).parent
        with contextlib.chdir(handle):
            listener.bind(name)
        listener.listen()
        listener.setblocking(False)
        task = asyncio.create_task(serve(listener))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for agent in agents:
                assert await agent.wait() == 0


async def test_a_session_over_a_long_path(tmp_path: Path) -> None:
    """An instance's directory may have a path that no socket address holds."""
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    async with listening(directory, "port1.sock"), AgentPorts(directory).session(10) as session:
        assert (await session.exec(["echo", "hello"])).stdout == b"hello\n"


async def test_control_over_its_port(tmp_path: Path) -> None:
    """The control port is port 0, with a lock of its own."""
    async with listening(tmp_path, "port0.sock", control=True), AgentPorts(tmp_path).control(10) as control:
        assert (await control.health()).uptime_ms > 0


async def test_sessions_take_the_first_free_port(tmp_path: Path) -> None:
    """Two sessions at once have two ports; when all are in use the next one is told so."""
    ports = AgentPorts(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        for number in range(1, 8):
            await stack.enter_async_context(listening(tmp_path, f"port{number}.sock"))
        sessions = [await stack.enter_async_context(ports.session(10)) for _ in range(7)]
        outputs = await asyncio.gather(*(session.exec(["echo", "x"]) for session in sessions))
        assert [result.stdout for result in outputs] == [b"x\n"] * 7
        with pytest.raises(Busy):
            async with ports.session(0.05):
                pass


async def test_a_port_is_waited_for(tmp_path: Path) -> None:
    """A session that ends makes room for one that waits."""
    ports = AgentPorts(tmp_path)
    async with listening(tmp_path, "port0.sock", control=True):
        async with ports.control(10):
            waiting = asyncio.create_task(_health(ports))
            await asyncio.sleep(0)
            assert not waiting.done()
        assert await waiting > 0


async def _health(ports: AgentPorts) -> int:
    async with ports.control(10) as control:
        return (await control.health()).uptime_ms


async def test_a_killed_process_frees_its_port(tmp_path: Path) -> None:
    """The kernel gives back the lock of a process that was killed while it held it."""
    script = "import fcntl,os,sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(  # noqa: ASYNC220  (it says one line at once)
        [sys.executable, "-c", script, str(tmp_path / "port0.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        async with listening(tmp_path, "port0.sock", control=True):
            with pytest.raises(Busy):
                async with AgentPorts(tmp_path).control(0.05):
                    pass
            holder.kill()
            assert await _health(AgentPorts(tmp_path)) > 0


async def test_a_machine_that_is_removed_is_not_waited_for(tmp_path: Path) -> None:
    """Who waits for a port of an instance that somebody removes is told so."""
    directory = tmp_path / "instance"
    directory.mkdir()
    ports = AgentPorts(directory)
    holding = [os.open(directory / f"port{port}.lock", os.O_RDWR | os.O_CREAT) for port in range(1, 8)]
    try:
        for lock in holding:
            fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = asyncio.create_task(_first_session(ports))
        await asyncio.sleep(0)
        shutil.rmtree(directory)
        with pytest.raises(VmmDied, match="directory is gone"):
            await waiting
    finally:
        for lock in holding:
            os.close(lock)


async def _first_session(ports: AgentPorts) -> None:
    async with ports.session(10):
        pass


FORKING = """
import asyncio, os, sys
from pathlib import Path
from coppice.guest.client import AgentPorts

async def main():
    async with AgentPorts(Path(sys.argv[1])).control(10) as control:
        await control.health()
        if os.fork() == 0:
            sys.stdin.read()
            os._exit(0)
    print("ready", flush=True)

asyncio.run(main())
"""


async def test_a_forked_process_does_not_keep_a_port(tmp_path: Path) -> None:
    """A worker of multiprocessing lives on when the session that was open at its birth has ended: the port is free again all the same."""
    forking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-c", FORKING, str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert forking.stdin is not None
    assert forking.stdout is not None
    try:
        async with listening(tmp_path, "port0.sock", control=True):
            assert await forking.stdout.readline() == b"ready\n"
            async with AgentPorts(tmp_path).control(5) as control:
                assert (await control.health()).uptime_ms > 0
    finally:
        forking.stdin.close()
        await forking.wait()


async def test_a_session_ends_though_somebody_else_has_its_socket(tmp_path: Path) -> None:
    """As a process has that was forked meanwhile: a VMM serves one connection at a time, and would serve nobody else."""
    ours, theirs = socket.socketpair()
    with ours.dup():
        process = await asyncio.create_subprocess_exec(
            agent_binary("static"), "--control", str(theirs.fileno()), pass_fds=[theirs.fileno()]
        )
        theirs.close()
        async with AgentPorts(tmp_path).control(10, sock=ours) as control:
            assert (await control.health()).uptime_ms > 0
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def test_there_is_no_machine(tmp_path: Path) -> None:
    """Without a VMM, or without the instance, it is the machine that is missing, and no port that is busy."""
    with pytest.raises(VmmDied):
        async with AgentPorts(tmp_path).session(0.05):
            pass
    with pytest.raises(VmmDied):
        async with AgentPorts(tmp_path / "gone").control(0.05):
            pass


async def test_a_socket_that_was_made_before(tmp_path: Path) -> None:
    """A connection can be handed in, and the request goes out with the handshake before anybody has answered."""
    ours, theirs = socket.socketpair()
    with theirs:
        async with AgentPorts(tmp_path).control(10, sock=ours) as control:
            health = asyncio.create_task(control.health())
            await asyncio.sleep(0)
            process = await asyncio.create_subprocess_exec(
                agent_binary("static"), "--control", str(theirs.fileno()), pass_fds=[theirs.fileno()]
            )
            assert (await health).uptime_ms > 0
    theirs.close()
    assert await process.wait() == 0


async def test_ports_over_vsock(tmp_path: Path) -> None:
    """A VMM with a vsock device has one socket for all ports; the number is asked for first."""
    ports = AgentPorts(tmp_path, connect=vsock_ports("vsock.sock"))
    async with listening(tmp_path, "vsock.sock", handshake=True), ports.session(10) as session:
        assert (await session.exec(["echo", "hello"])).stdout == b"hello\n"
