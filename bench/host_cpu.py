"""CPU time that a host process spends on each operation, without the VMMs and their guests.

    python -m bench.host_cpu --home DIR --image IMAGE --output benchmarks/host-cpu.json

Each operation is measured with no other recorded instance, and with many. The other instances are
records alone, without files: half of them stopped, half of them running as the budgets count it. Compare
figures within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from bench.accounting import host_facts
from bench.records import HostFacts, write_report
from coppice.client import AsyncHost
from coppice.model import Budgets, Instance, Record, State
from coppice.names import new_id
from coppice.requests import ExecRequest, ForkRequest, LsRequest, RmRequest, StatsRequest, TreeRequest
from coppice.state.journal import JournalOperation

_TEMPLATE, _TAG = "host-cpu", {"host-cpu": "other"}
_ROOMY = Budgets(max_instances=100_000, memory_bytes=1 << 50, memory_overcommit=16, disk_floor_bytes=0)


class Spent(Record, frozen=True, kw_only=True):
    """CPU milliseconds, user and system, of one operation in the host process."""

    median_ms: float
    least_ms: float
    samples_ms: tuple[float, ...] = ()


class Batch(Record, frozen=True, kw_only=True):
    """One request for many Standby forks."""

    count: int
    cpu_ms_per_fork: float
    forks_per_second: float


class HostCpuReport(Record, frozen=True, kw_only=True):
    """Figures by number of other instances, then by operation."""

    host: HostFacts | None = None  # older checkouts do not say it (see `side_by_side`)
    python: str
    samples: int
    loop_ms: float  # CPU of a fixed loop in the same run: compare runs by it
    spent: dict[str, dict[str, Spent]]
    batches: dict[str, list[Batch]]


async def cpu_ms(work: Callable[[], Awaitable[object]]) -> float:
    """Return the CPU time of this process, all threads, during one operation."""
    begin = time.process_time()
    await work()
    return (time.process_time() - begin) * 1000


def fixed_loop() -> float:
    """Return the CPU milliseconds of a fixed amount of work in Python."""
    begin = time.process_time()
    sum(number * number for number in range(1_000_000))
    return (time.process_time() - begin) * 1000


async def operations(host: AsyncHost, samples: int) -> dict[str, Spent]:
    """Measure each operation `samples` times. Listings are apart: one of 3,000 leaves the next fork cold caches."""
    taken: dict[str, list[float]] = {}

    async def measure(name: str, work: Callable[[], Awaitable[object]]) -> None:
        taken.setdefault(name, []).append(await cpu_ms(work))

    for number in range(samples):
        name = f"{_TEMPLATE}-{number}"
        await measure("fork", lambda name=name: host.call(ForkRequest(instance=_TEMPLATE, names=(name,), atomic=True)))  # type: ignore[misc]
        await measure("exec", lambda name=name: host.call(ExecRequest(instance=name, argv=("true",))))  # type: ignore[misc]
        await measure("exec again", lambda name=name: host.call(ExecRequest(instance=name, argv=("true",))))  # type: ignore[misc]
        await measure("rm", lambda name=name: host.call(RmRequest(instance=name)))  # type: ignore[misc]
    for _ in range(samples):
        await measure("ls", lambda: host.call(LsRequest()))
        await measure("tree", lambda: host.call(TreeRequest()))
        await measure("stats", lambda: host.call(StatsRequest()))
    taken["fork+exec+rm"] = [sum(each) for each in zip(taken["fork"], taken["exec"], taken["rm"], strict=True)]
    return {
        name: Spent(
            median_ms=round(statistics.median(spent), 2),
            least_ms=round(min(spent), 2),
            samples_ms=tuple(round(each, 2) for each in spent),
        )
        for name, spent in taken.items()
    }


async def batch(host: AsyncHost, count: int) -> Batch:
    """Measure one request for Standby forks, and remove them."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    report = await host.call(ForkRequest(instance=_TEMPLATE, count=count, target=State.STANDBY, atomic=True))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    for fork in report.instances:
        await host.call(RmRequest(instance=fork.id))
    return Batch(count=count, cpu_ms_per_fork=round(cpu * 1000 / count, 2), forks_per_second=round(count / seconds, 1))


def add_others(host: AsyncHost, like: Instance, count: int) -> None:
    """Record other instances. The running ones name no VMM, so nothing finds that it has ended."""
    others = [
        msgspec.structs.replace(
            like, id=new_id(), name=f"{_TEMPLATE}-other-{number}", state=state, capture=None, tags=_TAG
        )
        for number, state in zip(range(count), itertools.cycle((State.STOPPED, State.RUNNING)), strict=False)
    ]
    made = host.local.rooms.store.create(others, JournalOperation.RUN)
    host.local.rooms.store.finish(made, JournalOperation.RUN)


def remove_others(host: AsyncHost) -> None:
    """Remove the records of the other instances."""
    store = host.local.rooms.store
    for each in store.instances():
        if each.tags == _TAG:
            store.forget(each.id)


async def measured(home: Path, image: str, others: int, samples: int, batches: Sequence[int]) -> HostCpuReport:
    """Make a template, and measure without and with other instances."""
    spent: dict[str, dict[str, Spent]] = {}
    forked: dict[str, list[Batch]] = {}
    async with AsyncHost(home, budgets=_ROOMY, background="off", spares=0) as host:
        facts = await host_facts(host)
        machine = await host.run(image, name=_TEMPLATE, network="user")
        try:
            await machine.standby()
            await machine.promote()
            await operations(host, 2)  # imports, caches
            for number in (0, others):
                if number:
                    add_others(host, (await host.get(_TEMPLATE)).record, number)
                spent[str(number)] = await operations(host, samples)
                forked[str(number)] = [await batch(host, count) for count in batches]
        finally:
            remove_others(host)
            await machine.rm()
    loop_ms = round(statistics.median(fixed_loop() for _ in range(9)), 1)
    return HostCpuReport(host=facts, python=facts.python, samples=samples, loop_ms=loop_ms, spent=spent, batches=forked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="data directory with the image")
    parser.add_argument("--image", required=True)
    parser.add_argument("--others", type=int, default=3000)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="*", default=[100, 300])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    report = asyncio.run(measured(options.home, options.image, options.others, options.samples, options.batches))
    for others, found in report.spent.items():
        for name, each in found.items():
            sys.stdout.write(f"{others:>5} others  {name:14} {each.median_ms:8.2f} ms, least {each.least_ms:8.2f}\n")
        for one in report.batches[others]:
            sys.stdout.write(
                f"{others:>5} others  {one.count} Standby forks: {one.cpu_ms_per_fork:.2f} ms CPU each, "
                f"{one.forks_per_second:.0f}/s\n"
            )
    if options.output:
        write_report(report, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
