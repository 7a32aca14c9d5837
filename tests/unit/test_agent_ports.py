"""Agent ports: each port serves one host process at a time, however that process ends, and paths
may have any length.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from agent_process import agent_binary
from coppice.agent.channel import Channel
from coppice.agent.client import AgentPorts, Identity
from coppice.agent.control import Control
from coppice.agent.protocol import Fields, FrameType, Value, encode_fields
from coppice.errors import Busy, GuestProtocolError, VmmDied
from coppice.vmm.qemu.driver import QemuDriver
from coppice.vmm.sockets import connect_vsock
from fakes.wire import Peer


def ports_of(directory: Path) -> AgentPorts:
    """Return the ports of a machine that has a socket for each."""
    return AgentPorts(directory, partial(QemuDriver().dial, directory))


@contextlib.asynccontextmanager
async def listening(directory: Path, name: str, handshake: bool = False) -> AsyncIterator[None]:
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
                        "--serve",
                        str(connection.fileno()),
                        pass_fds=[connection.fileno()],
                    )
                )

    with socket.socket(socket.AF_UNIX) as listener:
        # The directory's path may be too long for a socket address, so the name is relative.
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
    """An instance's directory may have a path that is too long for a socket address."""
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    async with listening(directory, "port1.sock"), ports_of(directory).session(10) as session:
        assert (await session.exec(["echo", "hello"])).stdout == b"hello\n"


async def test_the_control_port_has_its_own_lock(tmp_path: Path) -> None:
    """The control port is port 0, with a lock of its own."""
    async with listening(tmp_path, "port0.sock"), ports_of(tmp_path).control(10) as control:
        assert (await control.health()).uptime_ms > 0


async def test_sessions_take_the_first_free_port(tmp_path: Path) -> None:
    """Two concurrent sessions have two ports; if all ports are in use, the next session is refused
    with that reason.
    """
    ports = ports_of(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        for number in range(1, 8):
            await stack.enter_async_context(listening(tmp_path, f"port{number}.sock"))
        sessions = [await stack.enter_async_context(ports.session(10)) for _ in range(7)]
        outputs = await asyncio.gather(*(session.exec(["echo", "x"]) for session in sessions))
        assert [result.stdout for result in outputs] == [b"x\n"] * 7
        with pytest.raises(Busy):
            async with ports.session(0.05):
                pass


async def test_a_session_waits_for_a_port(tmp_path: Path) -> None:
    """A session that ends frees its port for a waiting one."""
    ports = ports_of(tmp_path)
    async with listening(tmp_path, "port0.sock"):
        async with ports.control(10):
            waiting = asyncio.create_task(_health(ports))
            await asyncio.sleep(0)
            assert not waiting.done()
        assert await waiting > 0


async def _health(ports: AgentPorts) -> int:
    async with ports.control(10) as control:
        return (await control.health()).uptime_ms


async def test_a_killed_process_frees_its_port(tmp_path: Path) -> None:
    """The kernel releases the lock of a process that was killed while it held a port."""
    script = "import fcntl,os,sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(  # noqa: ASYNC220  (it says one line at once)
        [sys.executable, "-c", script, str(tmp_path / "port0.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        async with listening(tmp_path, "port0.sock"):
            with pytest.raises(Busy):
                async with ports_of(tmp_path).control(0.05):
                    pass
            holder.kill()
            assert await _health(ports_of(tmp_path)) > 0


async def test_a_wait_for_a_port_ends_when_the_instance_is_removed(tmp_path: Path) -> None:
    """A session that waits for a port of an instance that is then removed gets an error."""
    directory = tmp_path / "instance"
    directory.mkdir()
    ports = ports_of(directory)
    holding = [os.open(directory / f"port{port}.lock", os.O_RDWR | os.O_CREAT) for port in range(1, 8)]
    try:
        for lock in holding:
            fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = asyncio.create_task(_first_session(ports))
        await asyncio.sleep(0)
        shutil.rmtree(directory)
        with pytest.raises(VmmDied, match="directory was removed"):
            await waiting
    finally:
        for lock in holding:
            os.close(lock)


async def _first_session(ports: AgentPorts) -> None:
    async with ports.session(10):
        pass


FORKING = """
import asyncio, os, sys
from functools import partial
from pathlib import Path
from coppice.agent.client import AgentPorts
from coppice.vmm.qemu.driver import QemuDriver

async def main():
    home = Path(sys.argv[1])
    async with AgentPorts(home, partial(QemuDriver().dial, home)).control(10) as control:
        await control.health()
        if os.fork() == 0:
            sys.stdin.read()
            os._exit(0)
    print("ready", flush=True)

asyncio.run(main())
"""


async def test_a_forked_process_does_not_keep_a_port(tmp_path: Path) -> None:
    """A multiprocessing worker may outlive the session that was open when the worker was forked:
    the port is free again.
    """
    forking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-c", FORKING, str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert forking.stdin is not None
    assert forking.stdout is not None
    try:
        async with listening(tmp_path, "port0.sock"):
            assert await forking.stdout.readline() == b"ready\n"
            async with ports_of(tmp_path).control(5) as control:
                assert (await control.health()).uptime_ms > 0
    finally:
        forking.stdin.close()
        await forking.wait()


async def test_a_session_ends_although_another_process_has_its_socket() -> None:
    """A process forked meanwhile inherits the socket. The VMM serves one connection at a time, so
    an open socket would block the next session.
    """
    ours, theirs = socket.socketpair()
    with ours.dup():
        process = await asyncio.create_subprocess_exec(
            agent_binary("static"), "--serve", str(theirs.fileno()), pass_fds=[theirs.fileno()]
        )
        theirs.close()
        channel = await Channel.over(ours, 10)
        assert (await Control(channel).health()).uptime_ms > 0
        await channel.close()
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def test_a_missing_machine_is_not_a_busy_port(tmp_path: Path) -> None:
    """Without a VMM or without the instance, the error is about the missing machine, not about a
    busy port.
    """
    with pytest.raises(VmmDied):
        async with ports_of(tmp_path).session(0.05):
            pass
    with pytest.raises(VmmDied):
        async with ports_of(tmp_path / "gone").control(0.05):
            pass


async def test_the_first_request_goes_out_with_the_handshake() -> None:
    """The request is sent before the agent answers."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = await Channel.over(ours, 10)
        health = asyncio.create_task(Control(channel).health())
        await asyncio.sleep(0)
        process = await asyncio.create_subprocess_exec(
            agent_binary("static"), "--serve", str(theirs.fileno()), pass_fds=[theirs.fileno()]
        )
        assert (await health).uptime_ms > 0
        await channel.close()
    theirs.close()
    assert await process.wait() == 0


async def test_a_vsock_device_serves_all_ports(tmp_path: Path) -> None:
    """A VMM with a vsock device has one socket for all ports; the host first asks for the port
    number.
    """
    ports = AgentPorts(tmp_path, partial(connect_vsock, tmp_path, "vsock.sock"))
    async with listening(tmp_path, "vsock.sock", handshake=True), ports.session(10) as session:
        assert (await session.exec(["echo", "hello"])).stdout == b"hello\n"


async def serve_guest(sock: socket.socket, serial: int, taken: int, seen: list[FrameType]) -> None:
    """Answer as the agent of a machine that has read the identity with this serial."""
    async with Peer.over(sock) as peer:
        while (frame := await peer.receive()) is not None:
            seen.append(FrameType(frame.type))
            reply: list[tuple[int, Value | None]] = [(1, Fields(frame.payload).integer(1, 0))]
            if frame.type == FrameType.HEALTH:
                reply = [(1, 1000), (2, serial), (3, "fake"), (7, taken)]
            elif frame.type == FrameType.CLOCK:
                reply = [(1, time.time_ns())]
            await peer.send(FrameType.OK, frame.stream, encode_fields(reply))


@pytest.mark.parametrize("lost", ["closed", "silent"])
@pytest.mark.parametrize(
    ("serial", "taken", "asked"),
    [
        pytest.param(3, 1, [FrameType.HEALTH, FrameType.IDENTITY], id="not read"),
        pytest.param(4, 1, [FrameType.HEALTH, FrameType.CLOCK], id="taken"),
        pytest.param(4, 0, [FrameType.HEALTH], id="failed"),
    ],
)
async def test_an_identity_is_sent_again_if_its_connection_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, serial: int, taken: int, asked: list[FrameType]
) -> None:
    """Firecracker before 1.16 ends connections that are made before the guest has handled the reset
    of its vsock. An identity that the guest has read is not sent again: it is enough that the guest
    has taken it.
    """
    monkeypatch.setattr("coppice.agent.client._LOST_S", (0.2, 20.0))
    seen = list[FrameType]()
    async with asyncio.TaskGroup() as group, contextlib.AsyncExitStack() as stack:
        dialled = 0

        async def dial(_: int) -> socket.socket:
            nonlocal dialled
            dialled += 1
            mine, theirs = socket.socketpair()
            if dialled > 1:
                group.create_task(serve_guest(theirs, serial, taken, seen))
            elif lost == "closed":
                theirs.close()
            else:
                stack.enter_context(theirs)
            return mine

        identity = Identity(serial=4, entropy=bytes(64))
        with contextlib.nullcontext() if taken else pytest.raises(GuestProtocolError, match="answer was lost"):
            await AgentPorts(tmp_path, dial).identify(lambda: identity, 20.0, may_lose=True)
        assert seen == asked
    with pytest.raises(VmmDied):
        await AgentPorts(tmp_path, closed).identify(lambda: identity, 20.0)


async def closed(_: int) -> socket.socket:
    """Return a connection whose other end is closed."""
    mine, theirs = socket.socketpair()
    theirs.close()
    return mine
