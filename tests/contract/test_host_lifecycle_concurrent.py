"""Several hosts over one data directory, in one process and in two: nothing is corrupted, nobody deadlocks, and one wins where one must."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.errors import Busy, NotFound, Refused
from coppice.host import AsyncHost
from coppice.instance.rooms import Deadlines
from coppice.model import State
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, fingerprint, make, memory_of
from fakes.rooms import open_rooms

Call = Callable[[AsyncHost], Awaitable[object]]


async def outcomes(*calls: Awaitable[object]) -> Counter[str]:
    """How many calls ended how: `ok`, or the kind of error. Anything else than a refusal is a failure."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Refused | NotFound):
            raise result
    return Counter("ok" if not isinstance(result, BaseException) else type(result).__name__ for result in results)


@pytest.mark.parametrize(
    ("state", "call", "after"),
    [
        (State.STANDBY, lambda host: host.restore("oak"), State.RUNNING),
        (State.STOPPED, lambda host: host.start("oak"), State.RUNNING),
        (State.RUNNING, lambda host: host.standby("oak"), State.STANDBY),
        (State.RUNNING, lambda host: host.stop("oak"), State.STOPPED),
        (State.STANDBY, lambda host: host.promote("oak"), State.TEMPLATE),
        (State.TEMPLATE, lambda host: host.demote("oak"), State.STANDBY),
    ],
    ids=["restore", "start", "standby", "stop", "promote", "demote"],
)
async def test_the_same_at_once_is_done_once(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, state: State, call: Call, after: State
) -> None:
    """Six callers over two hosts: one does it, the others find it done."""
    await make(fake_host, state)
    started = driver.faults.reached["boot"] + driver.faults.reached["restore"]
    async with make_host() as other:
        result = await outcomes(*(call(host) for host in (fake_host, other) for _ in range(3)))
        assert result == Counter(ok=6)
        assert (await other.get("oak")).state is after
    begun = driver.faults.reached["boot"] + driver.faults.reached["restore"] - started
    assert begun == (1 if after is State.RUNNING else 0)
    await assert_tidy(fake_host, "oak")


async def test_one_of_many_removes(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """The others hear that it is gone, and no lock file comes back with them."""
    await make(fake_host, State.RUNNING)
    async with make_host() as other:
        result = await outcomes(*(host.rm("oak") for host in (fake_host, other) for _ in range(3)))
    assert result == Counter(ok=1, NotFound=5)
    await assert_tidy(fake_host)


async def test_one_of_many_gets_the_name(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """A name is taken in a transaction: two hosts cannot both have it."""
    async with make_host() as other:
        result = await outcomes(*(boot(host) for host in (fake_host, other) for _ in range(2)))
    assert result == Counter(ok=1, NameTaken=3)
    await assert_tidy(fake_host, "oak")


async def test_a_template_cannot_be_demoted_while_it_is_forked(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """A fork under way holds its source: the demotion waits, and is then refused, since there is a fork."""
    await make(fake_host, State.TEMPLATE)
    gate = driver.faults.hold_at("restore")
    forking = asyncio.create_task(fake_host.fork("oak", names=["elm"]))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with make_host() as other:
        waiting = [asyncio.create_task(work) for work in (other.demote("oak"), other.rm("oak"))]
        done, _ = await asyncio.wait(waiting, timeout=0.05)
        assert not done
        gate.release.set()
        assert (await forking).succeeded == 1
        assert await outcomes(*waiting) == Counter(InUse=2)
    await assert_tidy(fake_host, "oak", "elm")


async def test_many_fan_outs_of_one_source_go_on_at_once(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """A fork takes its source's lock shared: the second fan-out does not wait for the first."""
    await make(fake_host, State.TEMPLATE)
    gate = driver.faults.hold_at("restore")
    first = asyncio.create_task(fake_host.fork("oak", names=["elm"]))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with make_host() as other:
        assert (await asyncio.wait_for(other.fork("oak", count=3), 10)).succeeded == 3
        gate.release.set()
        assert (await first).succeeded == 1
    assert (await fake_host.inspect("oak")).fork_count == 4


async def test_who_waits_too_long_is_told(fake_home: Path, driver: FakeDriver) -> None:
    """Busy, with the instance's name, after the deadline for locks, and nothing is changed."""
    impatient = Deadlines(lock=0.05)
    async with AsyncHost(fake_home, driver=driver, deadlines=impatient, open_rooms=open_rooms) as host:
        await make(host, State.STANDBY)
        gate = driver.faults.hold_at("restore")
        restoring = asyncio.create_task(host.restore("oak"))
        await asyncio.wait_for(gate.reached.wait(), 10)
        for call in (host.rm, host.promote, host.fork, host.stop):
            with pytest.raises(Busy, match="oak"):
                await call("oak")
        gate.release.set()
        assert (await restoring).state is State.RUNNING
        await assert_tidy(host, "oak")


async def test_eight_commands_for_seven_ports(fake_host: AsyncHost) -> None:
    """One waits until another has ended; none is refused, none gets another's output."""
    await boot(fake_host)
    words = [str(number) for number in range(24)]
    assert await asyncio.gather(*(ask(fake_host, "oak", "echo", word) for word in words)) == words


async def test_looking_while_others_remove(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """`ls`, `tree` and `stats` of what is being removed, or has just been killed, are lists and not errors."""
    await make(fake_host, State.TEMPLATE)
    report = await fake_host.fork("oak", count=8)

    async def remove() -> None:
        for fork in report.instances:
            await fake_host.rm(fork)

    async with make_host() as other:
        removing = asyncio.create_task(remove())
        while not removing.done():
            await asyncio.gather(other.ls(), other.tree(), other.stats(), other.gc())
        await removing
    await assert_tidy(fake_host, "oak")


async def churn(host: AsyncHost, rng: random.Random, rounds: int, others: str) -> Counter[str]:
    """Do anything to anything, as two users who do not speak with each other; refusals are fine, all else is raised."""
    done: Counter[str] = Counter()

    async def names() -> list[str]:
        return [vm.name for vm in await host.ls()] or ["oak"]

    async def one() -> None:
        name = rng.choice(await names())
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "boot": lambda: boot(host, f"{others}-{rng.randrange(3)}"),
            "standby": lambda: host.standby(name),
            "restore": lambda: host.restore(name),
            "start": lambda: host.start(name),
            "stop": lambda: host.stop(name, grace_s=0),
            "promote": lambda: host.promote(name),
            "demote": lambda: host.demote(name),
            "fork": lambda: host.fork(name, count=2, target=rng.choice([State.STANDBY, State.STOPPED, State.RUNNING])),
            "rm": lambda: host.rm(name),
            "inspect": lambda: host.inspect(name),
            "gc": lambda: host.gc(),
        }
        what = rng.choice(list(calls))
        try:
            await calls[what]()
            done[what] += 1
        except (Refused, NotFound) as error:
            done[type(error).__name__] += 1

    for _ in range(rounds):
        await asyncio.gather(*(one() for _ in range(3)))
    return done


@pytest.mark.parametrize("seed", range(3))
async def test_two_hosts_do_anything_to_anything(fake_host: AsyncHost, make_host: HostFactory, seed: int) -> None:
    """Six operations at a time, at random: at the end every instance is whole, and every captured memory is usable."""
    await make(fake_host, State.TEMPLATE)
    async with make_host() as other, asyncio.timeout(60):
        done = await asyncio.gather(
            churn(fake_host, random.Random(seed), 40, "a"), churn(other, random.Random(-seed - 1), 40, "b")
        )
    total = done[0] + done[1]
    assert sum(total.values()) == 240
    # Not each of them: which is refused is a matter of who comes first, and on a loaded host it may be every fork.
    assert sum(total[what] for what in ("boot", "standby", "restore", "stop", "fork", "rm")) >= 12, total
    await finish(fake_host)


async def finish(host: AsyncHost) -> None:
    """All that is left is whole, comes to life as itself, and goes."""
    instances = await host.ls()
    await assert_tidy(host, *(vm.name for vm in instances))
    for vm in instances:
        if vm.state is State.STANDBY:
            captured = fingerprint(memory_of(host, vm))
            await host.restore(vm)
            assert await ask(host, vm, "hostname") == vm.hostname
            assert fingerprint(memory_of(host, vm)) == captured
    for vm in reversed(await host.ls()):
        await host.rm(vm)
    await assert_tidy(host)


RIVAL = """
import asyncio, random, sys
from pathlib import Path
from coppice.host import AsyncHost
from fakes.driver import FakeDriver
from fakes.rooms import DEADLINES, open_rooms
from test_host_lifecycle_concurrent import churn

async def main(program, home, seed):
    driver = FakeDriver(Path(program))
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms) as host:
        print("begin", flush=True)
        sys.stdin.readline()
        print(sum((await churn(host, random.Random(int(seed)), 40, "rival")).values()), flush=True)
        for vm in await host.ls():
            if vm.vmm is not None:
                try:
                    await host.stop(vm, grace_s=0)  # its guest would fall silent with this process
                except Exception as error:
                    print(error, file=sys.stderr)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_two_processes_do_anything_to_anything(fake_host: AsyncHost, fake_vmm: Path, fake_home: Path) -> None:
    """The same between processes: locks, transactions and the journal are all there is between them."""
    await make(fake_host, State.TEMPLATE)
    paths = os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])
    rival = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", RIVAL, str(fake_vmm), str(fake_home), "7"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert rival.stdout is not None
    assert rival.stdin is not None
    assert await asyncio.wait_for(rival.stdout.readline(), 30) == b"begin\n"
    rival.stdin.write(b"go\n")
    async with asyncio.timeout(60):
        mine, said = await asyncio.gather(churn(fake_host, random.Random(8), 40, "mine"), rival.communicate())
    assert rival.returncode == 0, said[1].decode()
    assert said[0] == b"120\n"
    assert sum(mine.values()) == 120
    await finish(fake_host)
