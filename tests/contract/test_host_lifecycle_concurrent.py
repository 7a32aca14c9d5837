"""Several hosts use one data directory, in one process and in two, without corruption or deadlock;
where only one can succeed, one does.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import Busy, NotFound, Refused
from coppice.machine.rooms import Deadlines
from coppice.model import State
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    GetRequest,
    InspectRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, fingerprint, make, memory_of
from fakes.rooms import open_rooms

Call = Callable[[AsyncHost], Awaitable[object]]


async def outcomes(*calls: Awaitable[object]) -> Counter[str]:
    """Count the calls by outcome: `ok`, or the kind of refusal. Raise any other error."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Refused | NotFound):
            raise result
    return Counter("ok" if not isinstance(result, BaseException) else type(result).__name__ for result in results)


@pytest.mark.parametrize(
    ("state", "call", "after"),
    [
        (State.STANDBY, lambda host: host.call(RestoreRequest(instance="oak")), State.RUNNING),
        (State.STOPPED, lambda host: host.call(StartRequest(instance="oak")), State.RUNNING),
        (State.RUNNING, lambda host: host.call(StandbyRequest(instance="oak")), State.STANDBY),
        (State.RUNNING, lambda host: host.call(StopRequest(instance="oak")), State.STOPPED),
        (State.STANDBY, lambda host: host.call(PromoteRequest(instance="oak")), State.TEMPLATE),
        (State.TEMPLATE, lambda host: host.call(DemoteRequest(instance="oak")), State.STANDBY),
    ],
    ids=["restore", "start", "standby", "stop", "promote", "demote"],
)
async def test_the_same_change_at_once_is_done_once(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, state: State, call: Call, after: State
) -> None:
    """Six callers on two hosts ask for the same change: one makes it, and the others
    find it done.
    """
    await make(fake_host, state)
    started = driver.faults.reached["boot"] + driver.faults.reached["restore"]
    async with make_host() as other:
        result = await outcomes(*(call(host) for host in (fake_host, other) for _ in range(3)))
        assert result == Counter(ok=6)
        assert (await other.call(GetRequest(instance="oak"))).state is after
    begun = driver.faults.reached["boot"] + driver.faults.reached["restore"] - started
    assert begun == (1 if after is State.RUNNING else 0)
    await assert_tidy(fake_host, "oak")


async def test_one_of_many_removals_succeeds(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """The others get NotFound, with the name that they gave, and do not create the lock file again."""
    await make(fake_host, State.RUNNING)
    async with make_host() as other:
        calls = (host.call(RmRequest(instance="oak")) for host in (fake_host, other) for _ in range(3))
        results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, NotFound)]
    assert (len(refused), results.count(None)) == (5, 1)
    assert all(re.search(r"\boak\b", error.message) for error in refused)
    await assert_tidy(fake_host)


async def test_one_of_many_gets_the_name(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """A name is taken in a transaction, so two hosts cannot both get it."""
    async with make_host() as other:
        result = await outcomes(*(boot(host) for host in (fake_host, other) for _ in range(2)))
    assert result == Counter(ok=1, NameTaken=3)
    await assert_tidy(fake_host, "oak")


async def test_a_template_cannot_be_demoted_while_it_is_forked(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """A demotion waits for a fork under way, and is refused when the fork exists."""
    await make(fake_host, State.TEMPLATE)
    gate = driver.faults.hold_at("restore")
    forking = asyncio.create_task(fake_host.call(ForkRequest(instance="oak", names=["elm"])))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with make_host() as other:
        waiting = [
            asyncio.create_task(work)
            for work in (other.call(DemoteRequest(instance="oak")), other.call(RmRequest(instance="oak")))
        ]
        done, _ = await asyncio.wait(waiting, timeout=0.05)
        assert not done
        gate.release.set()
        assert (await forking).succeeded == 1
        assert await outcomes(*waiting) == Counter(InUse=2)
    await assert_tidy(fake_host, "oak", "elm")


async def test_fan_outs_of_one_source_run_in_parallel(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """A fork takes its source's lock shared, so the second fan-out does not wait for the first."""
    await make(fake_host, State.TEMPLATE)
    gate = driver.faults.hold_at("restore")
    first = asyncio.create_task(fake_host.call(ForkRequest(instance="oak", names=["elm"])))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with make_host() as other:
        assert (await asyncio.wait_for(other.call(ForkRequest(instance="oak", count=3)), 10)).succeeded == 3
        gate.release.set()
        assert (await first).succeeded == 1
    assert (await fake_host.call(InspectRequest(instance="oak"))).fork_count == 4


async def test_waiting_too_long_for_a_lock_raises_busy(fake_home: Path, driver: FakeDriver) -> None:
    """After the deadline for locks, the error names the instance, and nothing has changed."""
    impatient = Deadlines(lock=0.05)
    async with AsyncHost(fake_home, driver=driver, deadlines=impatient, open_rooms=open_rooms) as host:
        await make(host, State.STANDBY)
        gate = driver.faults.hold_at("restore")
        restoring = asyncio.create_task(host.call(RestoreRequest(instance="oak")))
        await asyncio.wait_for(gate.reached.wait(), 10)
        for kind in (RmRequest, PromoteRequest, ForkRequest, StopRequest):
            with pytest.raises(Busy, match="oak"):
                await host.call(kind(instance="oak"))
        gate.release.set()
        assert (await restoring).state is State.RUNNING
        await assert_tidy(host, "oak")


async def test_more_commands_than_ports_wait_for_a_free_port(fake_host: AsyncHost) -> None:
    """A command without a free port waits for another to end.

    None is refused, and none gets another's output.
    """
    await boot(fake_host)
    words = [str(number) for number in range(24)]
    assert await asyncio.gather(*(ask(fake_host, "oak", "echo", word) for word in words)) == words


async def test_listing_while_another_host_removes(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """`ls`, `tree` and `stats` raise no error while instances are removed or killed."""
    await make(fake_host, State.TEMPLATE)
    report = await fake_host.call(ForkRequest(instance="oak", count=8))

    async def remove() -> None:
        for fork in report.instances:
            await fake_host.call(RmRequest(instance=fork.id))

    async with make_host() as other:
        removing = asyncio.create_task(remove())
        while not removing.done():
            await asyncio.gather(other.ls(), other.tree(), other.stats(), other.gc())
        await removing
    await assert_tidy(fake_host, "oak")


async def churn(host: AsyncHost, rng: random.Random, rounds: int, others: str) -> Counter[str]:
    """Run random operations on random instances; accept refusals, and raise any other error."""
    done: Counter[str] = Counter()

    async def names() -> list[str]:
        return [vm.name for vm in await host.call(LsRequest())] or ["oak"]

    async def one() -> None:
        name = rng.choice(await names())
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "boot": lambda: boot(host, f"{others}-{rng.randrange(3)}"),
            "standby": lambda: host.call(StandbyRequest(instance=name)),
            "restore": lambda: host.call(RestoreRequest(instance=name)),
            "start": lambda: host.call(StartRequest(instance=name)),
            "stop": lambda: host.call(StopRequest(instance=name, grace_s=0)),
            "promote": lambda: host.call(PromoteRequest(instance=name)),
            "demote": lambda: host.call(DemoteRequest(instance=name)),
            "fork": lambda: host.call(
                ForkRequest(instance=name, count=2, target=rng.choice([State.STANDBY, State.STOPPED, State.RUNNING]))
            ),
            "rm": lambda: host.call(RmRequest(instance=name)),
            "inspect": lambda: host.call(InspectRequest(instance=name)),
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
async def test_two_hosts_run_random_operations(fake_host: AsyncHost, make_host: HostFactory, seed: int) -> None:
    """Six random operations run at a time.

    At the end every instance is whole, and every captured memory is usable.
    """
    await make(fake_host, State.TEMPLATE)
    async with make_host() as other, asyncio.timeout(60):
        done = await asyncio.gather(
            churn(fake_host, random.Random(seed), 40, "a"), churn(other, random.Random(-seed - 1), 40, "b")
        )
    total = done[0] + done[1]
    assert sum(total.values()) == 240
    # Do not require each operation: timing decides the refusals, and a loaded host may refuse every
    # fork.
    assert sum(total[what] for what in ("boot", "standby", "restore", "stop", "fork", "rm")) >= 12, total
    await finish(fake_host)


async def finish(host: AsyncHost) -> None:
    """Check that each instance is whole and that its capture can be restored; then remove it."""
    instances = await host.call(LsRequest())
    await assert_tidy(host, *(vm.name for vm in instances))
    for vm in instances:
        if vm.state is State.STANDBY:
            captured = fingerprint(memory_of(host, vm))
            await host.call(RestoreRequest(instance=vm.id))
            assert await ask(host, vm, "hostname") == vm.hostname
            assert fingerprint(memory_of(host, vm)) == captured
    for vm in reversed(await host.call(LsRequest())):
        await host.call(RmRequest(instance=vm.id))
    await assert_tidy(host)


RIVAL = """
import asyncio, random, sys
from pathlib import Path
from coppice.client import AsyncHost
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
            if vm.record.vmm is not None:
                try:
                    await vm.stop(grace_s=0)  # this process emulates the guest
                except Exception as error:
                    print(error, file=sys.stderr)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_two_processes_run_random_operations(fake_host: AsyncHost, fake_vmm: Path, fake_home: Path) -> None:
    """Two processes share only the locks, the transactions and the journal."""
    await make(fake_host, State.TEMPLATE)
    here = Path(__file__).parent  # has a conftest of its own, which must not hide that of all tests
    paths = os.pathsep.join([str(here.parent), str(here), *(path for path in sys.path if path)])
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
