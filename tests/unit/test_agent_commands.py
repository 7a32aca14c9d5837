"""Commands that outlive their host: many on one connection, output that is kept, and an end that reaches all of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from agent_process import BUILDS, Agent, agent_binary, names, running_agent
from coppice.agent.channel import Channel
from coppice.agent.process import ExecSession
from coppice.agent.session import Session
from coppice.errors import Busy, CommandNotStarted, GuestTimeout, NotFound, VmmDied

Connect = Callable[[], "contextlib.AbstractAsyncContextManager[Session]"]


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


@contextlib.asynccontextmanager
async def listening_agent(tmp_path: Path, build: str = "static") -> AsyncIterator[Connect]:
    """An agent that outlives its connections, and a function that connects to it."""
    path = str(tmp_path / "agent.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        process = await asyncio.create_subprocess_exec(
            agent_binary(build), "--listen", str(listener.fileno()), pass_fds=[listener.fileno()]
        )

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[Session]:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        channel = await Channel.over(sock, 20.0)
        try:
            yield Session(channel)
        finally:
            await channel.close()

    try:
        yield connect
    finally:
        process.kill()
        await process.wait()


async def output_of(running: ExecSession) -> bytes:
    return b"".join([data async for _, data in running])


@pytest.mark.parametrize("build", BUILDS)
async def test_many_commands_share_a_connection(build: str) -> None:
    """Three hundred at once, each with its own input and output; one that is not read delays none of them."""
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 60.0)
        session = Session(channel)
        async with session.exec_stream(["yes"]) as unread:
            await anext(aiter(unread))
            results = await asyncio.gather(
                *(session.exec(shell(f"cat; echo {number}"), stdin=b"%d-" % number) for number in range(300))
            )
        assert [result.stdout for result in results] == [b"%d-%d\n" % (number, number) for number in range(300)]
        await channel.close()


async def test_a_thousand_commands_leave_nothing_behind() -> None:
    """Neither the agent's memory nor its descriptors grow with the number of commands that have ended."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 60.0)
        session = Session(channel)
        sizes = []
        for _ in range(3):
            for start in range(0, 400, 20):
                results = await asyncio.gather(*(session.exec(["echo", str(start + n)]) for n in range(20)))
                assert [result.stdout for result in results] == [b"%d\n" % (start + n) for n in range(20)]
            sizes.append((agent.resident_bytes(), len(names(f"/proc/{agent.process.pid}/fd"))))
        assert sizes[2][0] - sizes[0][0] < 256 << 10
        assert sizes[2][1] == sizes[0][1]
        assert await session.commands() == []
        assert not channel._streams
        await channel.close()


@pytest.mark.parametrize("build", BUILDS)
async def test_a_command_goes_on_without_its_host_and_loses_no_output(tmp_path: Path, build: str) -> None:
    """Hosts that vanish in the middle of it, twenty of them: each next one gets the output from where the one before was."""
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; echo err $i >&2; i=$((i+1)); done; exit 5"
    wanted = b"".join(b"line %d\n" % n for n in range(3000))
    got = {"stdout": b"", "stderr": b""}
    async with listening_agent(tmp_path, build) as connect:
        async with connect() as session, session.exec_stream(shell(script), command_id="long", detached=True):
            pass
        offset, turns, exit_code = 0, 0, None
        while exit_code is None:
            turns += 1
            async with connect() as session, session.attach("long", offset=offset) as running:
                taken = 0
                async for stream, data in running:
                    got[stream] += data
                    taken += 1
                    if turns < 20 and taken == 2:
                        break  # the connection is closed without a word
                else:
                    exit_code = (await running.wait()).exit_code
                offset = running.offset
                assert running.dropped_bytes == 0
    assert exit_code == 5
    assert hashlib.sha256(got["stdout"]).digest() == hashlib.sha256(wanted).digest()
    assert got["stderr"] == wanted.replace(b"line", b"err")


@pytest.mark.parametrize("build", BUILDS)
async def test_old_output_is_dropped_beyond_the_bound_and_counted(tmp_path: Path, build: str) -> None:
    """A command without a host never waits: the latest output is kept, and a client is told how much it missed."""
    total = 4 << 20
    async with listening_agent(tmp_path, build) as connect, connect() as session:
        started = session.exec_stream(
            shell(f"head -c {total} /dev/zero; echo end"), command_id="big", detached=True, keep_bytes=100_000
        )
        async with started:
            pass
        async with session.attach("big", output=False) as waiting:
            assert (await waiting.wait()).exit_code == 0
        async with session.attach("big") as running:
            output = await output_of(running)
        assert output.endswith(b"\0end\n")
        assert 100_000 <= len(output) < 300_000
        assert running.dropped_bytes + len(output) == total + 4 == running.offset
        (listed,) = await session.commands()
        assert (listed.id, listed.exit_code, listed.output_bytes) == ("big", 0, total + 4)
        assert listed.dropped_bytes == running.dropped_bytes


async def test_a_command_is_listed_fed_signalled_and_waited_for_by_others(tmp_path: Path) -> None:
    """Any client can do with a command what the one that started it could."""
    async with listening_agent(tmp_path) as connect:
        async with (
            connect() as session,
            session.exec_stream(
                shell("trap 'echo usr1' USR1; echo up; read a; echo $a; while read b; do :; done; exit 9"),
                command_id="shared",
                detached=True,
            ),
        ):
            pass
        async with connect() as session:
            (listed,) = await session.commands()
            assert (listed.id, listed.argv[:2], listed.exit_code) == ("shared", ("/bin/sh", "-c"), None)
            assert not listed.attached
            async with session.attach("shared", stdin=True) as first, session.attach("shared") as second:
                with pytest.raises(Busy):
                    async with session.attach("shared", stdin=True):
                        pass
                outputs = aiter(first)
                assert await anext(outputs) == ("stdout", b"up\n")
                await first.send_stdin(b"word\n")
                assert await anext(outputs) == ("stdout", b"word\n")
                await second.signal(10)
                assert await anext(outputs) == ("stdout", b"usr1\n")
                await first.eof()
                assert (await first.wait()).exit_code == 9
                assert await output_of(second) == b"up\nword\nusr1\n"
            with pytest.raises(NotFound, match="has no command other"):
                async with session.attach("other"):
                    pass
            with pytest.raises(CommandNotStarted, match="File exists"):
                async with session.exec_stream(["true"], command_id="shared"):
                    pass


async def test_the_number_of_ended_commands_that_are_remembered_is_bounded(tmp_path: Path) -> None:
    """The oldest are forgotten first."""
    async with listening_agent(tmp_path) as connect, connect() as session:
        for number in range(100):
            async with session.exec_stream(["true"], command_id=f"c{number}", detached=True):
                pass
            async with session.attach(f"c{number}", output=False) as running:
                await running.wait()
        listed = await session.commands()
        assert [command.id for command in listed] == [f"c{number}" for number in range(36, 100)]


@pytest.mark.parametrize("build", BUILDS)
async def test_a_command_that_is_ended_by_name_is_remembered(tmp_path: Path, build: str) -> None:
    """It gets SIGTERM, and its output and end can be asked for. One that its client ends is forgotten."""
    script = shell("trap 'echo told; exit 8' TERM; echo up; while :; do read word; done")
    async with listening_agent(tmp_path, build) as connect, connect() as session:
        async with session.exec_stream(script, command_id="named", detached=True, has_stdin=True) as running:
            pass
        async with session.attach("named") as running:
            assert await anext(aiter(running)) == ("stdout", b"up\n")
        async with session.exec_stream(script, command_id="own") as running:
            assert await anext(aiter(running)) == ("stdout", b"up\n")
        async with session.attach("named", output=False) as running:
            assert (await running.terminate()).exit_code == 8
            assert (await running.terminate()).exit_code == 8
        async with session.attach("named") as running:
            assert await output_of(running) == b"up\ntold\n"
        async with asyncio.timeout(60):
            while len(listed := await session.commands()) > 1:  # noqa: ASYNC110 - the guest sends no event
                await asyncio.sleep(0.01)
        assert [command.id for command in listed] == ["named"]


@pytest.mark.parametrize("how", ["timeout", "leave"])
async def test_the_end_reaches_children_in_sessions_of_their_own(tmp_path: Path, how: str) -> None:
    """A time-out and a client that leaves end what the command has started, `setsid` children included."""
    pids = tmp_path / "pids"
    script = f"setsid sh -c 'echo $$ >> {pids}; exec sleep 1000' & echo $$ >> {pids}; sleep 1000"
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 20.0)
        session = Session(channel)
        if how == "timeout":
            with pytest.raises(GuestTimeout):
                await session.exec(shell(script), timeout_s=0.5)
        else:
            async with session.exec_stream(shell(script)):
                while not pids.exists() or len(pids.read_text().split()) < 2:  # noqa: ASYNC110 - a process of another writes it
                    await asyncio.sleep(0.01)
        for pid in map(int, pids.read_text().split()):
            async with asyncio.timeout(10):
                while _runs(pid):  # noqa: ASYNC110 - another process's child
                    await asyncio.sleep(0.01)
        await channel.close()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_lost_connection_says_that_the_command_was_started() -> None:
    """The error tells whether the command may have done its work, and by which name to look for it."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 20.0)
        async with Session(channel).exec_stream(["sleep", "1000"], command_id="lost") as running:
            _kill(agent)
            with pytest.raises(VmmDied, match="sleep had been started as command lost, and may run on"):
                await running.wait()
        await channel.close()


def _kill(agent: Agent) -> None:
    agent.kill()


async def test_a_silent_guest_is_noticed_by_a_waiting_client() -> None:
    """A client that waits for a command is told within its patience that the guest says nothing, not even to a ping."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 0.6)
        async with Session(channel).exec_stream(["sleep", "1000"]) as running:
            os.kill(agent.process.pid, 19)
            try:
                with pytest.raises(GuestTimeout, match=r"silent for .* may run on"):
                    async with asyncio.timeout(10):
                        await running.wait()
            finally:
                os.kill(agent.process.pid, 18)
        await channel.close()


async def test_a_quiet_command_is_not_taken_for_a_silent_guest() -> None:
    """Pings are answered while a command prints nothing."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 0.6)
        assert (await Session(channel).exec(["sleep", "1.5"])).exit_code == 0
        await channel.close()


async def test_a_killed_helper_is_an_error_at_once(tmp_path: Path) -> None:
    """A copy whose process in the guest is killed fails; it does not wait, and does not look complete."""
    os.mkfifo(tmp_path / "never")
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, 20.0)
        upload = asyncio.create_task(Session(channel).write_file(str(tmp_path / "x"), _endless()))
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
        while not children.read_text().split():  # noqa: ASYNC110 - a child of the agent
            await asyncio.sleep(0.01)
        os.kill(int(children.read_text().split()[0]), 9)
        with pytest.raises(Exception, match="ended by signal 9"):
            async with asyncio.timeout(10):
                await upload
        await channel.close()


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield secrets.token_bytes(1000)
        await asyncio.sleep(0.001)
