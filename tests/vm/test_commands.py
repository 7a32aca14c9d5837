"""Commands outlive their clients in a real guest: nothing is lost, and nothing is left."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from coppice.client import AsyncHost, AsyncMachine
from coppice.commands import PROCESS
from coppice.errors import GuestError, GuestTimeout
from coppice.model import MIB, Instance
from coppice.model.guest import ExecSession
from flat_memory import assert_flat

KILLS = int(os.environ.get("COPPICE_CRASH_KILLS", "10"))
AT_ONCE = int(os.environ.get("COPPICE_COMMANDS_AT_ONCE", "40"))
SHORT = int(os.environ.get("COPPICE_COMMANDS_SHORT", "100"))
WAIT_S = 120.0
SOURCE = Path(__file__).parents[2] / "src"

# Prints until it is told to end, slowly enough that the default bound is never reached between two
# clients; and keeps a copy of its output in the guest.
PRODUCER = """
{ i=0
  while [ ! -e /run/enough ]; do
    i=$((i+1)); printf "line %d %0400d\\n" $i $i; sleep 0.05
  done
} | tee /run/copy
exit 6
"""


async def running(machine: AsyncMachine) -> list[str]:
    """Return the ids of the commands that run, without the machine's process."""
    return [each.id for each in await machine.commands.ls() if each.exit_code is None and each.id != PROCESS]


def coppice(home: Path, *words: str) -> list[str]:
    """Return the command line of another process of this program."""
    return [sys.executable, "-m", "coppice", "--home", str(home), *words]


async def started(*words: str) -> asyncio.subprocess.Process:
    """Start a client."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, env=env)


async def taken_before_its_death(client: asyncio.subprocess.Process, least: int) -> bytes:
    """Kill a client in mid output. Return the output that it has passed on."""
    assert client.stdout is not None
    taken = bytearray()
    async with asyncio.timeout(WAIT_S):
        while len(taken) < least:
            data = await client.stdout.read(least - len(taken))
            assert data, "the client ended by itself"
            taken += data
        client.kill()
        rest, _ = await client.communicate()
    assert client.returncode == -signal.SIGKILL
    return bytes(taken) + rest


@pytest.mark.timeout(300 + 10 * KILLS)
async def test_killed_clients_lose_no_output(host: AsyncHost, vm: Instance) -> None:
    """The client of a command is killed again and again. Each next one continues at the byte where
    the last one was, and the output is complete.
    """
    machine = host.machine(vm)
    output = bytearray()
    chance = random.Random(KILLS)
    command = ""
    for number in range(KILLS):
        words = ["attach", "-n", "--offset", str(len(output)), vm.name, command]
        if not number:
            words = ["exec", vm.name, "--", "sh", "-c", PRODUCER]
        client = await started(*coppice(host.home, *words))
        output += await taken_before_its_death(client, chance.randint(1, 3000))
        (command,) = await running(machine)
    await machine.exec(["touch", "/run/enough"])
    last = await started(*coppice(host.home, "attach", "--offset", str(len(output)), vm.name, command))
    async with asyncio.timeout(WAIT_S):
        rest, _ = await last.communicate()
    assert last.returncode == 6
    output += rest
    said = (await machine.exec(["sha256sum", "/run/copy"])).stdout.decode().split()[0]
    assert hashlib.sha256(output).hexdigest() == said
    assert output.count(b"\n") >= KILLS


async def _agent_bytes(vm: AsyncMachine) -> int:
    status = (await vm.exec(["grep", "RssAnon", "/proc/1/status"])).stdout
    return int(status.split()[1]) * 1024


def _lines(number: int) -> bytes:
    return b"".join(b"%d %d\n" % (number, line) for line in range(100))


@pytest.mark.timeout(300 + 5 * AT_ONCE + SHORT)
async def test_many_commands_lose_nothing_and_leave_nothing(host: AsyncHost, vm: Instance) -> None:
    """All at once, each with its own input and output; then many short ones, twenty at once."""
    machine = host.machine(vm)
    script = 'echo up; read word; i=0; while [ $i -lt 100 ]; do echo "$word $i"; i=$((i+1)); done; exit 3'
    waiting = [asyncio.Event() for _ in range(AT_ONCE)]
    together = asyncio.Event()

    async def one(number: int) -> tuple[bytes, int]:
        async with machine.open_exec(["sh", "-c", script]) as session:
            items = aiter(session)
            assert await anext(items) == ("stdout", b"up\n")
            waiting[number].set()
            await together.wait()
            await session.send_stdin(b"%d\n" % number)
            output = b"".join([data async for _, data in items])
            return output, (await session.wait()).exit_code

    async def release() -> None:
        for each in waiting:
            await each.wait()
        assert len(await running(machine)) == AT_ONCE
        together.set()

    async with asyncio.timeout(WAIT_S + 5 * AT_ONCE + SHORT):
        *results, _ = await asyncio.gather(*(one(number) for number in range(AT_ONCE)), release())
        assert results == [(_lines(number), 3) for number in range(AT_ONCE)]
        before = await _agent_bytes(machine)
        began, cpu = time.monotonic(), time.process_time()
        for first in range(0, SHORT, 20):
            numbers = range(first, min(first + 20, SHORT))
            ended = await asyncio.gather(*(machine.exec(["echo", str(number)]) for number in numbers))
            assert [each.stdout for each in ended] == [b"%d\n" % number for number in numbers]
        cpu, wall = time.process_time() - cpu, time.monotonic() - began
        alone = time.process_time()
        for _ in range(SHORT // 10):
            await machine.exec(["true"])
        alone = (time.process_time() - alone) / (SHORT // 10)
        after = await _agent_bytes(machine)
    sys.stdout.write(  # shown with -s, for the documentation
        f"{AT_ONCE} at once; {SHORT} short: {cpu / SHORT * 1000:.2f} ms of CPU and {wall / SHORT * 1000:.1f} ms each, "
        f"{alone * 1000:.2f} ms of CPU one after another; "
        f"agent {before >> 10} KiB before, {after >> 10} KiB after\n"
    )
    assert after - before < MIB
    assert [each.id for each in await machine.commands.ls()] == [PROCESS]


@pytest.mark.timeout(300 + 10 * AT_ONCE + 2 * SHORT)
async def test_the_hosts_memory_stays_flat(host: AsyncHost, vm: Instance) -> None:
    """After short commands one after another, and after rounds of many at once. (The contract tests have connections,
    copies and watches too.)
    """
    machine = host.machine(vm)

    async def short() -> None:
        assert (await machine.exec(["echo", "said"])).stdout == b"said\n"

    async def together() -> None:
        await asyncio.gather(*(short() for _ in range(AT_ONCE)))

    async with asyncio.timeout(WAIT_S + 10 * AT_ONCE + 2 * SHORT):
        grown = [await assert_flat(short, SHORT), await assert_flat(together, 3, at_once=AT_ONCE)]
    sys.stdout.write(f"bytes after {SHORT} short commands, and after 3 rounds of {AT_ONCE} at once: {grown}\n")


async def _next_line(session: ExecSession) -> bytes:
    line = b""
    async for _, data in session:
        line += data
        if line.endswith(b"\n"):
            return line
    raise AssertionError(f"the command ended after {line!r}")


async def _alive(vm: AsyncMachine, pids: Sequence[bytes]) -> int:
    found = await vm.exec(
        ["sh", "-c", 'for each; do kill -0 "$each" && echo alive; done', "sh", *map(bytes.decode, pids)]
    )
    return found.stdout.count(b"alive")


async def test_a_detached_command_goes_on_in_standby_and_forks_and_ends_whole(host: AsyncHost, vm: Instance) -> None:
    """A fork inherits it, and not the commands of clients. Its end reaches a child that has left its
    session and ignores SIGTERM.
    """
    machine = host.machine(vm)
    script = (
        "setsid sh -c 'trap : TERM; echo $$; while :; do sleep 1; done' & echo $$; read word; echo $word; read word"
    )
    await machine.commands.start(["sh", "-c", script], command="job", stdin=True)
    async with machine.commands.attach("job") as session, machine.open_exec(["sleep", "1000"]) as other:
        pids = (await _next_line(session)).split()
        while len(pids) < 2:
            pids += (await _next_line(session)).split()
        offset = session.offset
        async with machine.fork_one(name=f"{vm.name}-child", from_running=True) as child:
            assert (await child.commands.wait(other.id, WAIT_S)).exit_code == 128 + signal.SIGHUP
            assert await running(child) == ["job"]
            await child.commands.kill("job")
            assert await _alive(child, pids) == 0
    await machine.standby()
    await machine.restore()
    async with machine.commands.attach("job", offset, stdin=True) as session:
        await session.send_stdin(b"still here\n")
        assert await _next_line(session) == b"still here\n"
    assert await _alive(machine, pids) == 2
    with pytest.raises(GuestTimeout):
        await machine.commands.wait("job", 0.1)
    await machine.commands.kill("job")
    assert await _alive(machine, pids) == 0
    assert (await machine.commands.wait("job")).exit_code == 143


async def test_each_command_begins_in_a_group_of_its_own(host: AsyncHost, vm: Instance) -> None:
    """Also the first one of a fork, whose group was made before the capture; and one whose empty group the
    guest's root has removed.
    """
    machine = host.machine(vm)
    show = ["sh", "-c", "echo $(cat /proc/self/cgroup)"]
    before = await machine.exec(show)
    async with machine.fork_one(name=f"{vm.name}-child", from_running=True) as child:
        shown = [(await child.exec(show)).stdout for _ in range(2)]
        assert len({before.stdout, *shown}) == 3
        assert all(each.startswith(b"0::/coppice/") for each in shown)
    async with machine.fork_one(name=f"{vm.name}-other", from_running=True) as child:
        await child.exec(["sh", "-c", "rmdir /sys/fs/cgroup/coppice/* 2>/dev/null"])
        assert (await child.exec(show)).stdout.startswith(b"0::/coppice/")


async def test_a_command_that_kills_everything_in_the_guest(host: AsyncHost, vm: Instance) -> None:
    """Whoever waits learns of the end in time. Process 1 serves the guest's ports, so the next command runs."""
    machine = host.machine(vm)
    async with asyncio.timeout(WAIT_S), machine.open_exec(["sleep", "1000"]) as other:
        copying = asyncio.create_task(machine.read_file("/dev/zero", max_bytes=1 << 40))
        killed = await machine.exec(["sh", "-c", "kill -9 -1"], timeout_s=3)
        assert killed.exit_code == 0  # a process does not signal itself so
        assert (await other.wait()).signal == signal.SIGKILL
        while not (await asyncio.wait({copying}, timeout=1))[0]:  # it may have begun after the kill
            await machine.exec(["sh", "-c", "kill -9 -1"], timeout_s=3)
        with pytest.raises(GuestError):
            await copying
        assert (await machine.exec(["echo", "still"])).stdout == b"still\n"
        assert (await machine.wait_process(WAIT_S)).record.process_end is not None


async def test_limits_of_a_command(host: AsyncHost, vm: Instance) -> None:
    """More memory than the limit ends the command alone, and more processes cannot be made."""
    machine = host.machine(vm)
    eater = ["python3", "-c", "print(len(bytearray(200 << 20)))"]
    started = await machine.commands.start(eater, memory_limit_bytes=64 * MIB)
    ended = await machine.commands.wait(started.id, WAIT_S)
    assert (ended.exit_code, ended.out_of_memory) == (137, True)
    assert (await machine.exec(eater)).exit_code == 0
    forks = ["sh", "-c", "for each in 1 2 3 4 5 6; do sleep 2 & done; wait"]
    refused = await machine.exec(forks, pids_limit=4)
    assert refused.exit_code != 0
    assert b"fork" in refused.stderr
    assert (await machine.exec(forks)).exit_code == 0
