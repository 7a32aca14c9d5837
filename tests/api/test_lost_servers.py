"""A command outlives the server that started it, and its client goes on at the next server."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncMachine
from coppice.client.connecting import connect_async
from coppice.client.remote import patience
from coppice.errors import HostCannot
from coppice.model.guest import GuestCommand
from fakes.hosting import boot
from servers import SILENT, Servers

DEADLINE_S = 100.0
ENDS = [signal.SIGKILL, signal.SIGTERM]
COUNT = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); [ $((i % 100)) = 0 ] && sleep 0.02; done; exit 7"
COUNTED = b"".join(b"line %d\n" % number for number in range(3000))


async def machines(stack: AsyncExitStack, make_host: HostFactory, address: str) -> tuple[AsyncMachine, AsyncMachine]:
    """Return a machine, as this process and as a client of the server see it."""
    local = await stack.enter_async_context(make_host())
    vm = await boot(local)
    remote = await stack.enter_async_context(connect_async(address))
    return await local.get(vm.id), await remote.get(vm.id)


async def until_started(vm: AsyncMachine) -> GuestCommand:
    """Wait for the first command in a machine."""
    while not (found := await vm.commands.ls()):  # noqa: ASYNC110 - the guest reports no event
        await asyncio.sleep(0.02)
    return found[0]


def shell(script: str) -> list[str]:
    """Return a command line that the real agent runs."""
    return ["/bin/sh", "-c", script]


async def test_a_start_whose_answer_was_lost(servers: Servers, make_host: HostFactory, tmp_path: Path) -> None:
    """The client gets the one command that was started, with all of its output."""
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        address = await servers.start(variables={SILENT: "1"})
        here, there = await machines(stack, make_host, address)
        started = asyncio.create_task(
            there.commands.start(shell(f"echo once >>{tmp_path}/runs; echo up; exec sleep 1000"))
        )
        running = await until_started(here)
        await servers.end(signal.SIGKILL)
        await servers.start()
        found = await started
        assert (found.id, found.pid) == (running.id, running.pid)
        async with there.commands.attach(found.id) as session:
            assert await anext(aiter(session)) == ("stdout", b"up\n")
        assert (tmp_path / "runs").read_text() == "once\n"
        await there.commands.kill(found.id)


@pytest.mark.parametrize("has_started", [True, False])
async def test_a_session_whose_first_frame_was_lost(
    servers: Servers, make_host: HostFactory, tmp_path: Path, has_started: bool
) -> None:
    """The command is started once, by the lost server or by the next one. Closing the session ends it."""
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        address = await servers.start(variables={SILENT: "1"})
        here, there = await machines(stack, make_host, address)
        script = shell(f"echo once >>{tmp_path}/runs; cat; exec sleep 1000")

        async def use() -> str:
            async with there.open_exec(script) as session:
                await session.send_stdin(b"input\n")
                assert await anext(aiter(session)) == ("stdout", b"input\n")
                return session.id

        using = asyncio.create_task(use())
        if has_started:
            await until_started(here)
        else:
            await asyncio.wait({using}, timeout=0.001)
        await servers.end(signal.SIGKILL)
        await servers.start()
        command = await using
        assert (tmp_path / "runs").read_text() == "once\n"
        assert (await here.commands.wait(command)).exit_code in (128 + signal.SIGTERM, 128 + signal.SIGHUP)


@pytest.mark.parametrize("end", ENDS)
async def test_a_session_goes_on_at_the_next_server(
    servers: Servers, make_host: HostFactory, end: signal.Signals
) -> None:
    """It yields each byte of the output once, and the exit status; the end of the input arrives."""
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        _, there = await machines(stack, make_host, await servers.start())
        async with there.open_exec(shell(f"cat; {COUNT}")) as session:
            await session.eof()
            output = b""
            async for _, data in session:
                if b"line 500\n" in output + data and b"line 500\n" not in output:
                    await servers.end(end)
                    restarted = asyncio.create_task(servers.start())
                output += data
            assert output == COUNTED
            assert session.dropped_bytes == 0
            assert (await session.wait()).exit_code == 7
        await restarted


async def test_signals_and_input_wait_for_the_next_server(servers: Servers, make_host: HostFactory) -> None:
    """What is sent while there is no server arrives, and closing the session still ends the command."""
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        here, there = await machines(stack, make_host, await servers.start())
        script = "trap 'echo got INT' INT; echo up; while :; do read line && echo $line; done"
        async with there.open_exec(shell(script)) as session:
            output = aiter(session)
            assert await anext(output) == ("stdout", b"up\n")
            following = asyncio.ensure_future(anext(output))
            await servers.end(signal.SIGKILL)
            await asyncio.wait({following}, timeout=0.2)
            await session.signal(signal.SIGINT)
            typed = asyncio.create_task(session.send_stdin(b"typed\n"))
            await servers.start()
            found = (await following)[1]
            while found.count(b"\n") < 2:
                found += (await anext(output))[1]
            assert sorted(found.splitlines()) == [b"got INT", b"typed"]
            await typed
        assert (await here.commands.wait(session.id)).exit_code > 128


async def test_input_that_may_be_lost_is_an_error(servers: Servers, make_host: HostFactory) -> None:
    """The client does not guess how much of it the command has got, and says how to go on."""
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        here, there = await machines(stack, make_host, await servers.start())
        async with there.open_exec(["/bin/cat"]) as session:
            await session.send_stdin(b"one\n")
            assert await anext(aiter(session)) == ("stdout", b"one\n")
            await servers.end(signal.SIGKILL)
            with pytest.raises(HostCannot, match="input may be lost") as caught:
                await session.wait()
        assert caught.value.hint is not None
        assert f"`coppice attach {here.id} {session.id}`" in caught.value.hint
        assert [each.exit_code for each in await here.commands.ls()] == [None]
        await here.commands.kill(session.id)


@pytest.mark.parametrize("end", ENDS)
async def test_waits_go_on_at_the_next_server(servers: Servers, make_host: HostFactory, end: signal.Signals) -> None:
    """For the end of a command and of a machine."""
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        here, there = await machines(stack, make_host, await servers.start())
        command = (await here.commands.start(shell("read a; exit 5"), stdin=True)).id
        command_end = asyncio.ensure_future(there.commands.wait(command))
        machine_end = asyncio.ensure_future(there.wait(300))
        await asyncio.wait({command_end, machine_end}, timeout=0.5)
        await servers.end(end)
        await servers.start()
        await asyncio.wait({command_end, machine_end}, timeout=0.5)
        assert not command_end.done()
        assert not machine_end.done()
        async with here.commands.attach(command, stdin=True) as session:
            await session.send_stdin(b"\n")
        assert (await command_end).exit_code == 5
        await here.stop()
        await machine_end


@pytest.mark.parametrize("end", ENDS)
async def test_without_a_next_server_the_error_says_what_to_do(
    servers: Servers, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    """The wait and the session end with an error of their own; the command goes on."""
    monkeypatch.setattr(patience, "PERSIST_S", 0.5)
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        here, there = await machines(stack, make_host, await servers.start())
        session = await stack.enter_async_context(there.open_exec(shell("echo up; exec sleep 1000"), stdin=False))
        assert await anext(aiter(session)) == ("stdout", b"up\n")
        waiting = asyncio.ensure_future(there.commands.wait(session.id))
        await asyncio.wait({waiting}, timeout=0.2)
        await servers.end(end)
        with pytest.raises(HostCannot, match=r"does not answer.*start it with `coppice serve`"):
            await waiting
        with pytest.raises(HostCannot, match=rf"has ended|was lost.*`coppice attach {here.id} {session.id}`"):
            await session.wait()
        assert [each.exit_code for each in await here.commands.ls()] == [None]
        await here.commands.kill(session.id)
