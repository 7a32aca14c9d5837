"""Sessions come and go, orderly or not: each gets exactly its own output, and nothing runs on for nobody."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from pathlib import Path

import pytest

from agent_process import BUILDS, agent_control, agent_session, running_agent
from coppice.errors import GuestRefused, GuestTimeout, VmmDied
from coppice.guest.channel import Channel
from coppice.guest.control import Identity
from coppice.guest.process import Command, encode_command
from coppice.guest.protocol import (
    HOST_PAYLOAD_MAX,
    PADDING,
    WINDOW_SIZE,
    FrameType,
    encode_fields,
    encode_frame,
    encode_hello,
    encode_request,
)
from coppice.guest.session import Session


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def until_gone(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
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
    """Wherever a host was killed in a frame, the next session on the same port works."""
    async with running_agent(build) as agent:
        half = encode_frame(FrameType.STDIN, bytes([0xA5]) * HOST_PAYLOAD_MAX)[:sent]
        await asyncio.get_running_loop().sock_sendall(agent.sock, PADDING + encode_hello(bytes(16)) + half)
        channel = await Channel.over(agent.sock, 20.0)
        assert (await Session(channel).exec(["echo", "mine"])).stdout == b"mine\n"
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
async def test_garbage_before_the_hello_is_thrown_away(build: str) -> None:
    """A port on which something else was written before is as good as a new one."""
    async with running_agent(build) as agent:
        await asyncio.get_running_loop().sock_sendall(agent.sock, b"\xff\x01\xa5GET / HTTP/1.0\r\n\r\n" * 3000)
        channel = await Channel.over(agent.sock, 20.0)
        assert (await Session(channel).exec(["echo", "mine"])).stdout == b"mine\n"
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
async def test_a_hello_in_a_flood_gets_exactly_its_own_output(build: str) -> None:
    """A new host on the port of a command that prints without pause, and whose output nobody reads, sees nothing of it."""
    async with agent_session(build) as session:
        for turn in range(5):
            async with session.exec_stream(["yes"]) as flood:
                await anext(aiter(flood))
            result = await session.exec(["echo", f"mine {turn}"])
            assert (result.stdout, result.stderr) == (f"mine {turn}\n".encode(), b"")


@pytest.mark.parametrize("how", ["hello", "hang-up"])
async def test_the_command_of_an_ended_session_ends(how: str) -> None:
    """SIGHUP, and SIGKILL half a second later for who ignores it, whether the host hangs up or another one says HELLO."""
    async with agent_session() as session:
        script = "trap '' HUP; echo ready; while :; do sleep 0.05; done"
        async with session.exec_stream(["/bin/sh", "-c", script]) as running:
            await anext(aiter(running))
            pid = running.pid
        if how == "hello":
            await session.exec(["true"])
            await until_gone(pid)
    assert gone(pid)  # the agent leaves only when it has ended its commands


async def test_a_command_that_leaves_the_session_alone_is_let_live() -> None:
    """What a finished command left behind runs on when its session is over."""
    async with agent_session() as session:
        daemon = int((await session.exec(["/bin/sh", "-c", "sleep 30 >/dev/null 2>&1 & echo $!"])).stdout)
        await session.exec(["true"])
        assert not gone(daemon)
        os.kill(daemon, 9)


@pytest.mark.parametrize("build", BUILDS)
async def test_back_pressure_reaches_the_command(build: str) -> None:
    """Output that nobody takes fills no memory, neither in the agent nor here: the command waits."""
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        progress = Path(f"/tmp/coppice-test-{secrets.token_hex(6)}")
        script = f"exec 3>{progress}; while :; do head -c 65536 /dev/zero; echo x >&3; done"
        try:
            async with Session(channel).exec_stream(["/bin/sh", "-c", script]) as running:
                before = agent.resident_bytes()
                await asyncio.sleep(0.5)  # what must not happen has no event
                assert progress.stat().st_size < 64  # lines: 64 KiB each
                assert agent.resident_bytes() - before < 1 << 20
                await running.signal(9)
                assert (await running.wait()).exit_code == 137
        finally:
            progress.unlink()
            await channel.close()


async def test_signals_get_through_while_output_is_held_up() -> None:
    """The agent reads what the host says also while the host does not read."""
    async with agent_session() as session, session.exec_stream(["yes"]) as running:
        await asyncio.sleep(0.1)  # until all buffers are full; a shorter wait makes the test easier, not wrong
        await running.signal(15)
        assert (await running.wait()).exit_code == 143


@pytest.mark.parametrize("build", BUILDS)
async def test_the_window_is_kept_by_the_agent(build: str) -> None:
    """A host that sends more than the window allows breaks the protocol: the agent answers so instead of keeping it."""
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        await channel.begin(encode_command(Command(argv=("sleep", "100"), has_stdin=True)))
        chunk = encode_frame(FrameType.STDIN, bytes(HOST_PAYLOAD_MAX))
        await channel.send(chunk * (2 * WINDOW_SIZE // HOST_PAYLOAD_MAX + 4))
        frame = await channel.receive()
        while frame.type in (FrameType.STARTED, FrameType.WINDOW):
            frame = await channel.receive()
        assert frame.type == FrameType.ERROR
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "request_bytes",
    [
        encode_frame(FrameType.EXEC, b"\x01\xff\xff\xff\xff"),
        encode_frame(FrameType.EXEC, b"\x01\x00"),
        encode_frame(FrameType.EXEC),
        encode_frame(FrameType.EXEC, encode_fields([(1, b"a\0b")])),
        encode_frame(FrameType.EXEC, encode_fields([(1, "true"), (2, "no assignment")])),
        encode_frame(FrameType.EXEC, encode_fields([(1, "true"), (8, b"short")])),
        encode_frame(FrameType.FILE_READ),
        encode_frame(FrameType.FILE_WRITE, b"\x00" * 7),
        encode_frame(FrameType.FILE_STAT, encode_fields([(1, "")])),
        encode_frame(FrameType.TAR_IN, encode_fields([(2, 1)])),
        encode_frame(FrameType.TAR_OUT, b"\x01"),
        encode_request(FrameType.EXEC, bytes(100_000)),
        encode_frame(FrameType.STDOUT, b"?"),
    ],
)
async def test_malformed_requests_are_refused(build: str, request_bytes: bytes) -> None:
    """No request harms the agent; each is answered with an error, and the next session works."""
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        await channel.begin(request_bytes)
        with pytest.raises(GuestRefused):
            await channel.reply()
        assert (await Session(channel).exec(["echo", "next"])).stdout == b"next\n"
        await channel.close()


async def test_a_silent_guest_is_a_timeout() -> None:
    """A wait for a guest that says nothing ends with an error."""
    ours, theirs = socket.socketpair()
    with theirs:
        channel = await Channel.over(ours, 0.05)
        with pytest.raises(GuestTimeout):
            await Session(channel).exec(["true"])
        await channel.close()


async def test_a_machine_that_goes_away_is_an_error() -> None:
    """The end of the connection in the middle of a command is no end of the command."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 20.0)
        async with Session(channel).exec_stream(["cat"]) as running:
            agent.kill()
            with pytest.raises(VmmDied):
                await running.wait()
        await channel.close()


async def test_control_answers_in_order() -> None:
    """Health and sync are answered on one connection, one after the other."""
    async with agent_control() as control:
        await control.sync()
        health = await control.health()
        assert health.agent_version == "1.0.0"
        assert health.identity_serial == 0
        assert health.uptime_ms > 0
        assert health.process_pid is None
        assert health.process_exit_code is None


async def test_control_of_a_test_harms_nobody() -> None:
    """Served on a test's socket the agent refuses what would change the machine it runs on."""
    async with agent_control() as control:
        with pytest.raises(GuestRefused):
            await control.identity(Identity(serial=1, entropy=bytes(64), hostname="not-this-machine"))
        with pytest.raises(GuestRefused):
            await control.poweroff()
        with pytest.raises(GuestRefused):
            await control.freeze(1)
        assert socket.gethostname() != "not-this-machine"


def test_frame_layout_is_the_documented_one() -> None:
    """Type, length, payload, end byte; little-endian."""
    assert encode_frame(FrameType.STDIN, b"ab") == struct.pack("<BI2sB", 33, 2, b"ab", 0xA5)
