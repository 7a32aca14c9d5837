"""Commands that go on without their client: the same on this machine and on a server.

The fake guests run them with the real agent, as processes of this host.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost, AsyncMachine
from coppice.client.connecting import connect_async
from coppice.client.remote import patience
from coppice.errors import (
    Busy,
    CommandNotFound,
    CommandNotStarted,
    Forbidden,
    GuestTimeout,
    HostCannot,
    InUse,
    InvalidName,
    NameTaken,
    NotFound,
    UsageError,
)
from coppice.model.guest import ExecSession
from coppice.requests import CommandStartRequest
from coppice.server.auth import make_token
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE
from servers import KEY, client_of, fake_hosts, served

WAIT_S = 60.0


def shell(script: str) -> list[str]:
    """Return a command line. Its program is an absolute path, so that the real agent runs it."""
    return ["/bin/sh", "-c", script]


async def oak(host: AsyncHost) -> AsyncMachine:
    """Return a running machine."""
    return await host.run(IMAGE, name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES)


async def output_of(session: ExecSession) -> bytes:
    """Return the output of both streams, to the end of the command."""
    return b"".join([data async for _, data in session])


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def _gone(pid: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while _runs(pid):  # noqa: ASYNC110 - another process's child
            await asyncio.sleep(0.01)


async def test_a_command_from_start_to_forget(any_host: AsyncHost) -> None:
    """It is started, listed, fed, followed by two clients from different offsets, and waited for."""
    vm = await oak(any_host)
    started = await vm.commands.start(shell("read a; echo $a; read b; echo $b >&2; exit 3"), stdin=True)
    command = started.id
    (listed,) = await vm.commands.ls()
    assert (listed.id, listed.argv[0], listed.exit_code, listed.stdin, listed.tty) == (
        command,
        "/bin/sh",
        None,
        True,
        False,
    )
    with pytest.raises(GuestTimeout, match=r"still runs after 0\.01 s"):
        await vm.commands.wait(command, 0.01)
    with pytest.raises(InUse, match="runs"):
        await vm.commands.forget(command)
    waiting = asyncio.create_task(vm.commands.wait(command))
    async with vm.commands.attach(command, stdin=True) as first:
        assert (first.id, first.pid, first.offset) == (command, listed.pid, 0)
        assert first.pid == started.pid
        with pytest.raises(Busy):
            async with vm.commands.attach(command, stdin=True):
                pass
        await first.send_stdin(b"one\n")
        assert await anext(aiter(first)) == ("stdout", b"one\n")
        assert first.offset == 4
    async with vm.commands.attach(command, 2, stdin=True) as second:
        items = aiter(second)
        assert await anext(items) == ("stdout", b"e\n")
        await second.send_stdin(b"two\n")
        assert await anext(items) == ("stderr", b"two\n")
        assert (await second.wait()).exit_code == 3
    ended = await waiting
    assert (ended.exit_code, ended.timed_out) == (3, False)
    async with vm.commands.attach(command) as late:
        assert await output_of(late) == b"one\ntwo\n"
        assert (late.offset, late.dropped_bytes) == (8, 0)
    (listed,) = await vm.commands.ls()
    assert (listed.exit_code, listed.output_bytes, listed.dropped_bytes) == (3, 8, 0)
    assert listed.ended_at is not None
    await vm.commands.forget(command)
    assert await vm.commands.ls() == []
    for gone in (vm.commands.wait(command), vm.commands.kill(command), vm.commands.forget(command)):
        with pytest.raises(NotFound, match=f"no command {command}"):
            await gone


async def test_the_beginning_of_much_output_is_dropped_and_counted(any_host: AsyncHost) -> None:
    """The marker says how many bytes are missing before the first ones."""
    vm = await oak(any_host)
    await vm.commands.start(shell("head -c 1000000 /dev/zero; echo end"), command="big", keep_bytes=50_000)
    await vm.commands.wait("big", WAIT_S)
    async with vm.commands.attach("big") as session:
        items = aiter(session)
        _, first = await anext(items)
        assert session.dropped_bytes == session.offset - len(first) > 0
        rest = b"".join([data async for _, data in items])
    assert rest.endswith(b"\0end\n")
    assert session.dropped_bytes + len(first + rest) == session.offset == 1_000_004
    (listed,) = await vm.commands.ls()
    assert (listed.output_bytes, listed.dropped_bytes) == (1_000_004, session.dropped_bytes)


async def test_kill_ends_all_of_a_command(any_host: AsyncHost, tmp_path: Path) -> None:
    """A child in a session of its own ends too. The command is remembered with its output."""
    vm = await oak(any_host)
    pids = tmp_path / "pids"
    script = f"setsid sh -c 'echo $$ >>{pids}; exec sleep 1000' & echo here; echo $$ >>{pids}; wait"
    await vm.commands.start(shell(script), command="tree")
    async with asyncio.timeout(WAIT_S):
        while not pids.exists() or len(pids.read_text().split()) < 2:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.01)
    await vm.commands.kill("tree")
    for pid in map(int, pids.read_text().split()):
        await _gone(pid)
    assert (await vm.commands.wait("tree")).exit_code == 143
    async with vm.commands.attach("tree") as session:
        assert await output_of(session) == b"here\n"
    await vm.commands.kill("tree")  # it has ended: nothing happens


async def test_a_signal_and_a_size_reach_the_command(any_host: AsyncHost) -> None:
    """A signal is handled by the command itself; a new client can change the size of its terminal."""
    vm = await oak(any_host)
    script = "trap 'stty size; exit 7' USR1; echo up; while :; do read x; done"
    await vm.commands.start(shell(script), command="on-terminal", tty=True, size=(10, 20), term="dumb", stdin=True)
    async with vm.commands.attach("on-terminal") as session:
        items = aiter(session)
        assert await anext(items) == ("stdout", b"up\r\n")
        await session.resize(30, 40)
        await vm.commands.kill("on-terminal", signal.SIGUSR1)
        assert b"".join([data async for _, data in items]) == b"30 40\r\n"
        assert (await session.wait()).exit_code == 7
    (listed,) = await vm.commands.ls()
    assert listed.tty


async def test_a_session_can_leave_its_command(any_host: AsyncHost) -> None:
    """Closing the session of `open_exec` ends the command, unless the session has left it."""
    vm = await oak(any_host)
    async with vm.open_exec(shell("echo up; read a; echo $a")) as session:
        assert await anext(aiter(session)) == ("stdout", b"up\n")
        left = session.id
        await session.leave()
    async with vm.open_exec(shell("echo up; read a; echo $a")) as ending:
        assert await anext(aiter(ending)) == ("stdout", b"up\n")
    await _gone(ending.pid)
    async with vm.commands.attach(left, stdin=True) as session:
        await session.send_stdin(b"later\n")
        assert await output_of(session) == b"up\nlater\n"


async def test_what_cannot_be_started_is_refused(any_host: AsyncHost) -> None:
    """Each refusal has the type of its reason, and leaves no command."""
    vm = await oak(any_host)
    with pytest.raises(CommandNotFound):
        await vm.commands.start(["/no/such/program"])
    with pytest.raises(CommandNotStarted) as caught:  # the agent of a fake guest has no control group
        await vm.commands.start(shell("true"), memory_limit_bytes=1 << 30)
    assert (
        caught.value.hint == "the guest's kernel cannot limit commands (control groups of version 2): omit the limits"
    )
    with pytest.raises(InvalidName):
        await vm.commands.start(shell("true"), command="a b")
    for wrong in ({"keep_bytes": 0}, {"keep_bytes": 1 << 40}, {"pids_limit": 0}, {"memory_limit_bytes": -1}):
        with pytest.raises(UsageError):
            await vm.commands.start(shell("true"), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no signal 65"):
        await vm.commands.kill("a", 65)
    assert await vm.commands.ls() == []
    await vm.commands.start(shell("true"), command="a")
    with pytest.raises(NameTaken, match="has a command a"):
        await vm.commands.start(shell("true"), command="a")


_CLIENT = """
import asyncio, sys
from coppice.client.connecting import connect_async

async def main():
    async with connect_async(sys.argv[1]) as host:
        async with (await host.get("oak")).open_exec(["/bin/sh", "-c", sys.argv[2]]) as session:
            async for _, data in session:
                print(session.id, session.pid, flush=True)
                if len(sys.argv) > 3:
                    return

asyncio.run(main())
"""


@pytest.mark.parametrize("printing", [True, False])
async def test_a_lost_client_leaves_its_command_and_one_that_closes_ends_it(
    socket_address: str, printing: bool
) -> None:
    """A killed client could not say what it wants, so the command goes on, whether it prints or not."""
    script = "echo up; while :; do echo more; sleep 0.01; done" if printing else "echo up; exec sleep 1000"
    async with connect_async(socket_address) as host:
        vm = await oak(host)
        for closes in (False, True):
            words = [socket_address, script, *(["leaves"] if closes else [])]
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _CLIENT, *words),
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            assert client.stdout is not None
            async with asyncio.timeout(WAIT_S):
                command, pid = (await client.stdout.readline()).decode().split()
            if not closes:
                client.kill()
            async with asyncio.timeout(WAIT_S):
                await client.communicate()
                # The server has noticed when no client is attached any more.
                while any(each.id == command and each.attached for each in await vm.commands.ls()):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            if closes:
                await _gone(int(pid))
            else:
                assert _runs(int(pid))
                await vm.commands.kill(command)


async def test_the_end_of_a_server_leaves_commands_running(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients learn how to go on."""
    monkeypatch.setattr(patience, "PERSIST_S", 0.2)
    async with AsyncExitStack() as clients:
        async with served(fake_hosts(fake_home, driver), Listening(socket=tmp_path / "a.sock"), None) as address:
            vm = await oak(await clients.enter_async_context(connect_async(address)))
            session = await clients.enter_async_context(vm.open_exec(shell("echo up; exec sleep 1000")))
            assert await anext(aiter(session)) == ("stdout", b"up\n")
        with pytest.raises(HostCannot) as caught:
            await session.wait()
        assert caught.value.hint == f"the command goes on: `coppice attach {vm.id} {session.id}` shows its output"
    async with make_host() as host:
        vm = await host.get("oak")
        assert [(each.id, each.exit_code) for each in await vm.commands.ls()] == [(session.id, None)]
        await vm.commands.kill(session.id)
    await _gone(session.pid)


async def test_a_wait_is_an_operation_that_the_client_hears_from(socket_address: str) -> None:
    """So it can be longer than the silence after which a client gives up, and be cancelled."""
    async with connect_async(socket_address) as host, client_of(socket_address) as client:
        vm = await oak(host)
        command = (await vm.commands.start(shell("exec sleep 1000"))).id
        waits: dict[str, dict[str, Any]] = {
            "command_wait": {"command": command},
            "wait": {"deadline_s": 1000},
            "wait_process": {},
        }
        for path, body in ((f"/call/{name}", body) for name, body in waits.items()):
            headers = {"prefer": "respond-async"}
            begun = await client.post(path, json={"instance": "oak", **body}, headers=headers)
            assert begun.status_code == 202
            ended = await client.delete(f"/operations/{begun.headers['coppice-operation']}")
            assert ended.json()["status"] == "cancelled"
        await vm.commands.kill(command)


async def test_a_repeated_start_starts_once(socket_address: str) -> None:
    """The server chooses the id before it begins."""
    async with connect_async(socket_address) as host, client_of(socket_address) as client:
        vm = await oak(host)
        body = {"instance": "oak", "argv": shell("exit 4")}
        answers = [
            await client.post("/call/command_start", json=body, headers={"idempotency-key": "one"}) for _ in range(3)
        ]
        (listed,) = await vm.commands.ls()
        assert [answer.json() for answer in answers] == [{"id": listed.id, "pid": listed.pid}] * 3


async def test_scopes_and_owners_are_those_of_exec(tcp_address: str, make_host: HostFactory) -> None:
    """A token for reading lists and waits; another owner finds no machine."""
    async with make_host() as local, connect_async(tcp_address, token=make_token(KEY, owner="ann")) as host:
        await local.images.tag(IMAGE, IMAGE, public=True)
        vm = await host.run(IMAGE, name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES)
        await vm.commands.start(shell("exit 5"), command="a")
    reading = make_token(KEY, owner="ann", scopes=["instance:read"])
    async with connect_async(tcp_address, token=reading) as host:
        vm = await host.get("oak")
        assert (await vm.commands.wait("a")).exit_code == 5
        assert [each.id for each in await vm.commands.ls()] == ["a"]
        for refused in (vm.commands.start(shell("true")), vm.commands.kill("a"), vm.commands.forget("a")):
            with pytest.raises(Forbidden):
                await refused
        with pytest.raises(Forbidden):
            async with vm.commands.attach("a"):
                pass
    async with connect_async(tcp_address, token=make_token(KEY, owner="bob")) as host:
        with pytest.raises(NotFound):
            await host.call(CommandStartRequest(instance="oak", argv=shell("true")))
        for hidden in (host.machine(vm.record).commands.ls(), host.machine(vm.record).commands.wait("a")):
            with pytest.raises(NotFound):
                await hidden
