"""The host's memory stays flat, whatever number of commands, connections, copies and watches it has served.

Through a server, it is the memory of the client and of the server, which share this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent_process import agent_binary
from coppice.client import AsyncHost, AsyncMachine
from coppice.model import State
from coppice.server import running
from fakes.hosting import make
from fakes.relay import files_below
from flat_memory import assert_flat

ROUNDS = int(os.environ.get("COPPICE_MEMORY_ROUNDS", "40"))
AT_ONCE = {"embedded": 200, "served": 40}  # a server has connections and records for each
DEADLINE_S = 200.0 + ROUNDS

Work = Callable[[AsyncMachine, Path], Awaitable[object]]


async def _command(vm: AsyncMachine, directory: Path) -> None:
    assert (await vm.exec(["echo", "said"])).stdout == b"said\n"


async def _real_command(vm: AsyncMachine, directory: Path) -> None:
    assert (await vm.exec(["/bin/cat"], stdin=bytes(5000))).stdout == bytes(5000)


async def _attached(vm: AsyncMachine, directory: Path) -> None:
    command = (await vm.commands.start(["/bin/echo", "said"])).id
    async with vm.commands.attach(command) as attached:
        assert b"".join([data async for _, data in attached]) == b"said\n"
    await vm.commands.ls()
    await vm.commands.forget(command)


async def _left(vm: AsyncMachine, directory: Path) -> None:
    """Leave a command in the middle of its output."""
    async with vm.open_exec(["/bin/sh", "-c", "echo said; sleep 100"]) as endless:
        await anext(aiter(endless))


async def _refused(vm: AsyncMachine, directory: Path) -> None:
    with contextlib.suppress(Exception):
        await vm.exec(["/nothing"])
    with contextlib.suppress(Exception):
        await vm.read_file(f"{directory}/missing")


async def _connection(vm: AsyncMachine, directory: Path) -> None:
    async with vm.connect(f"unix:{directory}/server") as (reader, writer):
        writer.write(b"x" * 5000)
        writer.write_eof()
        assert await reader.read() == b"x" * 5000


async def _copies(vm: AsyncMachine, directory: Path) -> None:
    await vm.write_file(f"{directory}/file", b"text")
    await vm.stat(f"{directory}/file")
    await vm.cp_in(directory / "tree", f"{directory}/copied")
    await vm.cp_out(f"{directory}/copied/.", directory / "back")


async def _watch(vm: AsyncMachine, directory: Path) -> None:
    async for event in vm.files.watch(f"{directory}/tree"):
        assert event.kind == "watching"
        break
    assert [entry async for entry in vm.files.ls(f"{directory}/tree")]


async def _logs(vm: AsyncMachine, directory: Path) -> None:
    async for _ in vm.logs(tail=10):
        break


WORK: dict[str, Work] = {
    "command": _command, "command of an agent": _real_command, "attach": _attached, "leave": _left, "refused": _refused,
    "connection": _connection, "copies": _copies, "watch": _watch, "logs": _logs,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a server remember so few operations that the first rounds reach that number."""
    agent_binary("static")
    monkeypatch.setattr(running, "_MOST_KEPT", 10)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read())
    await writer.drain()
    writer.close()


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("kind", WORK)
async def test_one_after_another(fake_host: AsyncHost, tmp_path: Path, kind: str) -> None:
    """However many there were, nothing is left behind."""
    vm = fake_host.machine(await make(fake_host, State.RUNNING))
    (tmp_path / "tree/deeper").mkdir(parents=True)
    (tmp_path / "tree/deeper/file").write_bytes(b"text")
    (tmp_path / "back").mkdir()
    with files_below(tmp_path):
        async with asyncio.timeout(DEADLINE_S), await asyncio.start_unix_server(_echo, tmp_path / "server"):
            await assert_flat(lambda: WORK[kind](vm, tmp_path), ROUNDS)


@pytest.mark.timeout(DEADLINE_S + 30)
async def test_rounds_of_many_at_once(fake_host: AsyncHost, carrier: str, tmp_path: Path) -> None:
    """Many commands at once, again and again: the memory of a round is used for the next one."""
    vm = fake_host.machine(await make(fake_host, State.RUNNING))

    async def together() -> None:
        await asyncio.gather(*(_command(vm, tmp_path) for _ in range(AT_ONCE[carrier])))

    async with asyncio.timeout(DEADLINE_S):
        await assert_flat(together, 3, at_once=AT_ONCE[carrier])
