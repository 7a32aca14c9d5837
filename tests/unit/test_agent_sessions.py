"""Sessions end in order or not: each gets exactly its own output, and no command outlives its
session.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from pathlib import Path

import pytest

from agent_process import BUILDS, agent_control, agent_session, running_agent
from coppice.agent.channel import Channel
from coppice.agent.control import Identity
from coppice.agent.process import Command, encode_command
from coppice.agent.protocol import (
    HOST_PAYLOAD_MAX,
    WINDOW_SIZE,
    FrameType,
    encode_fields,
    encode_frame,
    encode_hello,
)
from coppice.agent.session import Session
from coppice.errors import GuestRefused, GuestTimeout, VmmDied


def gone(pid: int) -> bool:
    """Return whether the process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def until_gone(pid: int) -> None:
    """Wait for the end of a process that is not a child of this one."""
    descriptor = os.pidfd_open(pid)
    try:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        async with asyncio.timeout(10):
            await ended.wait()
        loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("sent", [1, 3, 5, 6, 1000, HOST_PAYLOAD_MAX + 5])
async def test_a_half_sent_frame_of_an_earlier_host_does_no_harm(build: str, sent: int) -> None:
    """The next session on the same port works, wherever in a frame the last host was killed."""
    async with running_agent(build) as agent:
        half = encode_frame(FrameType.STDIN, 1, bytes([0xA5]) * HOST_PAYLOAD_MAX)[:sent]
        await asyncio.get_running_loop().sock_sendall(agent.sock, encode_hello(bytes(16)) + half)
        channel = await Channel.over(agent.sock, 20.0)
        assert (await Session(channel).exec(["echo", "mine"])).stdout == b"mine\n"
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
async def test_bytes_before_the_hello_are_discarded(build: str) -> None:
    """A port with leftover bytes works like a new one."""
    async with running_agent(build) as agent:
        await asyncio.get_running_loop().sock_sendall(agent.sock, b"\xff\x01\xa5GET / HTTP/1.0\r\n\r\n" * 3000)
        channel = await Channel.over(agent.sock, 20.0)
        assert (await Session(channel).exec(["echo", "mine"])).stdout == b"mine\n"
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
async def test_a_hello_during_a_flood_gets_only_its_own_output(build: str) -> None:
    """A new host on the port of a command that prints without pause sees none of that output."""
    async with agent_session(build) as session:
        for turn in range(5):
            async with session.exec_stream(["yes"]) as flood:
                await anext(aiter(flood))
            result = await session.exec(["echo", f"mine {turn}"])
            assert (result.stdout, result.stderr) == (f"mine {turn}\n".encode(), b"")


@pytest.mark.parametrize("how", ["hello", "hang-up"])
async def test_the_command_of_an_ended_session_ends(how: str) -> None:
    """The command gets SIGHUP, and SIGKILL half a second later if it ignores SIGHUP, whether the
    host hangs up or another one sends HELLO.
    """
    async with agent_session() as session:
        script = "trap '' HUP; echo ready; while :; do sleep 0.05; done"
        async with session.exec_stream(["/bin/sh", "-c", script]) as running:
            await anext(aiter(running))
            pid = running.pid
        if how == "hello":
            await session.exec(["true"])
            await until_gone(pid)
    assert gone(pid)  # the agent exits only after it has ended its commands


async def test_a_daemon_survives_the_end_of_its_session() -> None:
    """A daemon that a finished command left behind keeps running after the session."""
    async with agent_session() as session:
        daemon = int((await session.exec(["/bin/sh", "-c", "sleep 30 >/dev/null 2>&1 & echo $!"])).stdout)
        await session.exec(["true"])
        assert not gone(daemon)
        os.kill(daemon, 9)


@pytest.mark.parametrize("build", BUILDS)
async def test_back_pressure_reaches_the_command(build: str) -> None:
    """Output that is not read fills no memory in the agent or the host: the command waits."""
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        progress = Path(f"/tmp/coppice-test-{secrets.token_hex(6)}")
        script = f"exec 3>{progress}; while :; do head -c 65536 /dev/zero; echo x >&3; done"
        try:
            async with Session(channel).exec_stream(["/bin/sh", "-c", script]) as running:
                before = agent.resident_bytes()
                await asyncio.sleep(0.5)  # an absence has no event to await
                assert progress.stat().st_size < 64  # lines, one for each 64 KiB
                assert agent.resident_bytes() - before < 1 << 20
                await running.signal(9)
                assert (await running.wait()).exit_code == 137
        finally:
            progress.unlink()
            await channel.close()


async def test_signals_get_through_while_output_is_held_up() -> None:
    """The agent reads the host's frames even when the host does not read."""
    async with agent_session() as session, session.exec_stream(["yes"]) as running:
        # until all buffers are full; a shorter wait only makes the test easier
        await asyncio.sleep(0.1)
        await running.signal(15)
        assert (await running.wait()).exit_code == 143


@pytest.mark.parametrize("build", BUILDS)
async def test_the_agent_enforces_the_window(build: str) -> None:
    """A host that sends more than the window allows breaks the protocol: the agent answers with an
    error instead of buffering the data.
    """
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        command = Command(argv=("sleep", "100"), has_stdin=True, size=(24, 80), id="flooded")
        stream = await channel.open(FrameType.EXEC, encode_command(command))
        chunk = encode_frame(FrameType.STDIN, stream.id, bytes(HOST_PAYLOAD_MAX))
        await channel.send(chunk * (4 * WINDOW_SIZE // HOST_PAYLOAD_MAX + 4))
        frame = await stream.receive()
        assert frame.type == FrameType.STARTED
        frame = await stream.receive()
        assert frame.type == FrameType.ERROR
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (FrameType.EXEC, b"\x01\xff\xff\xff\xff"),
        (FrameType.EXEC, b"\x01\x00"),
        (FrameType.EXEC, b""),
        (FrameType.EXEC, encode_fields([(1, b"a\0b"), (10, "x")])),
        (FrameType.EXEC, encode_fields([(1, "true"), (2, "no assignment"), (10, "x")])),
        (FrameType.EXEC, encode_fields([(1, "true"), (8, b"short"), (10, "x")])),
        (FrameType.EXEC, encode_fields([(1, "true")])),
        (FrameType.EXEC, encode_fields([(1, "true"), (10, "no/id")])),
        (FrameType.EXEC, encode_fields([(1, "true"), (10, "x"), (11, 1 << 40)])),
        (FrameType.ATTACH, encode_fields([(2, 0)])),
        (FrameType.CONNECT, b""),
        (FrameType.CONNECT, encode_fields([(1, 65536)])),
        (FrameType.CONNECT, encode_fields([(2, "/x" * 100)])),
        (FrameType.FILE_READ, b""),
        (FrameType.FILE_WRITE, b"\x00" * 7),
        (FrameType.FILE_STAT, encode_fields([(1, "")])),
        (FrameType.TREE_IN, encode_fields([(2, 1)])),
        (FrameType.TREE_OUT, b"\x01"),
        (FrameType.EXEC, bytes(100_000)),
        (FrameType.STDOUT, b"?"),
    ],
)
async def test_malformed_requests_are_refused(build: str, kind: FrameType, payload: bytes) -> None:
    """No request harms the agent; each is answered with an error, and the next one works."""
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        with pytest.raises(GuestRefused):
            await channel.call(kind, payload)
        assert (await Session(channel).exec(["echo", "next"])).stdout == b"next\n"
        await channel.close()


async def test_a_silent_guest_is_a_timeout() -> None:
    """A wait for a guest that sends nothing ends with an error."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = await Channel.over(ours, 0.05)
        with pytest.raises(GuestTimeout):
            await Session(channel).exec(["true"])
        await channel.close()


async def test_a_machine_that_dies_is_an_error() -> None:
    """The end of the connection during a command is not the end of the command."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 20.0)
        async with Session(channel).exec_stream(["cat"]) as running:
            agent.kill()
            with pytest.raises(VmmDied):
                await running.wait()
        await channel.close()


async def test_control_requests_are_answered_in_order() -> None:
    """Health and sync requests on one connection are answered in their order."""
    async with agent_control() as control:
        await control.sync()
        health = await control.health()
        assert health.agent_version == "2.0.0"
        assert health.identity_serial == 0
        assert health.uptime_ms > 0
        assert health.process_pid is None
        assert health.process_end is None


async def test_control_of_a_test_does_not_change_the_host() -> None:
    """An agent that serves a test's socket refuses requests that would change the machine it runs
    on.
    """
    async with agent_control() as control:
        with pytest.raises(GuestRefused):
            await control.identity(Identity(serial=1, entropy=bytes(64), hostname="not-this-machine"))
        with pytest.raises(GuestRefused):
            await control.poweroff()
        with pytest.raises(GuestRefused):
            await control.freeze(1)
        assert socket.gethostname() != "not-this-machine"


def test_frame_layout_is_the_documented_one() -> None:
    """Type, stream, length, payload, end byte; little-endian."""
    assert encode_frame(FrameType.STDIN, 7, b"ab") == struct.pack("<BHH2sB", 33, 7, 2, b"ab", 0xA5)


async def test_what_was_sent_last_arrives() -> None:
    """Closing waits for a guest that reads slowly, also for the few bytes that no sender waits for."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.setblocking(False)
    with theirs:
        channel = await Channel.over(ours, 20.0)
        loop, sent = asyncio.get_running_loop(), bytes(range(256)) * 64
        channel.post(sent)
        assert 0 < channel._transport.get_write_buffer_size() < len(sent)
        closing = asyncio.create_task(channel.close())
        received = b""
        while data := await loop.sock_recv(theirs, 1000):
            received += data
        await closing
    assert received == sent
