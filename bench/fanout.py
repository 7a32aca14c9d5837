"""The fan-out benchmark: N machines by cold boot, two kinds of copying fork, and shared fork, in
turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from bench import accounting
from bench.accounting import Usage
from bench.copying import CopyingDriver, expected_copies
from bench.percentiles import summarize_fan_out
from bench.records import Cache, FanOutReport, MachineSample, Method, Round, Skipped
from bench.trial import Guest, Say, answer, boot, dirty, make_template, tagged
from coppice.client import AsyncHost, AsyncMachine
from coppice.errors import GuestError
from coppice.model import GIB, MIB, MemoryReport, Record, Sharing
from coppice.names import MAX_SPARES
from coppice.vmm import driver as files

# Same parallelism as a fan-out, so that boots queue no longer than forks.
_PARALLEL_BOOTS = 2 * (os.cpu_count() or 1)
# A boot reads no mem-file, and a spare has read parts of it before.
_WARM_ONLY = (Method.COLD, Method.AHEAD)


class FanOutPlan(Record, frozen=True, kw_only=True):
    """The plan of a run."""

    image: str
    kernel: str | None = None  # key of a guest kernel; None is Debian's
    network: str | None = None  # None is the host's default
    counts: tuple[int, ...] = (1, 4, 16)
    memory_bytes: tuple[int, ...] = (256 * MIB, GIB, 4 * GIB)
    methods: tuple[Method, ...] = tuple(Method)
    caches: tuple[Cache, ...] = tuple(Cache)
    samples: int = 8  # machines per case, at least
    min_rounds: int = 2
    workload_bytes: int = 16 * MIB
    copy_limit_bytes: int = 4 * GIB  # rounds of full copies that would write more are skipped

    def guest(self, memory_bytes: int) -> Guest:
        """Return the machine to measure, with this much RAM."""
        return Guest(image=self.image, kernel=self.kernel, network=self.network, memory_bytes=memory_bytes)

    def rounds(self, count: int) -> int:
        """Return how many rounds of `count` machines give enough samples."""
        return max(self.min_rounds, math.ceil(self.samples / count))


class Case(Record, frozen=True, kw_only=True):
    """One request to measure."""

    method: Method
    count: int
    memory_bytes: int
    cache: Cache


class _Grown(NamedTuple):
    machine: AsyncMachine
    own_ms: float
    stages: dict[str, float]
    disk_written_bytes: int


def cases(plan: FanOutPlan, memory_bytes: int) -> Iterator[tuple[int, Case]]:
    """Return all rounds for one memory size, numbered. Methods take turns, each round in another
    order.
    """
    kinds = [
        (method, cache)
        for method in plan.methods
        for cache in plan.caches
        if method not in _WARM_ONLY or cache is Cache.WARM
    ]
    if not kinds:
        return
    for number in range(max(map(plan.rounds, plan.counts))):
        turn = number % len(kinds)
        for count in plan.counts:
            if number < plan.rounds(count):
                for method, cache in kinds[turn:] + kinds[:turn]:
                    yield number, Case(method=method, count=count, memory_bytes=memory_bytes, cache=cache)


def skipped(plan: FanOutPlan, case: Case) -> Skipped | None:
    """Return why a case is skipped, or None."""
    if case.method is Method.AHEAD and case.count > MAX_SPARES:
        reason = f"a host starts no more than {MAX_SPARES} machines ahead"
        return Skipped(method=case.method, count=case.count, memory_bytes=case.memory_bytes, reason=reason)
    size = case.count * case.memory_bytes
    if case.method is not Method.COPY or size <= plan.copy_limit_bytes:
        return None
    reason = f"it would write {size // MIB} MiB, more than the limit of {plan.copy_limit_bytes // MIB} MiB"
    return Skipped(method=case.method, count=case.count, memory_bytes=case.memory_bytes, reason=reason)


async def measure_fan_out(host: AsyncHost, plan: FanOutPlan, say: Say) -> FanOutReport:
    """Run the whole plan. All its machines are removed, also on failure.

    :raises NotFound: there is no such image
    :raises CoppiceError: a machine could not be made; a benchmark that loses machines measures
        nothing
    """
    facts = await accounting.host_facts(host)
    rounds: list[Round] = []
    omitted: dict[Skipped, None] = {}
    guest_kernel = ""
    async with contextlib.AsyncExitStack() as stack:
        hosts = {Method.COLD: host, Method.SHARED: host, Method.AHEAD: host}
        for method in (Method.COPY, Method.SPARSE):
            driver = CopyingDriver(host.local.rooms.drivers.chosen, full=method is Method.COPY)
            hosts[method] = await stack.enter_async_context(AsyncHost(host.home, driver=driver, background="off"))
        for memory_bytes in plan.memory_bytes:
            async with tagged(host) as tags:
                say(f"{memory_bytes // MIB} MiB: booting the template")
                template = await make_template(host, plan.guest(memory_bytes), tags)
                guest_kernel = template.record.machine.kernel
                for number, case in cases(plan, memory_bytes):
                    if reason := skipped(plan, case):
                        omitted[reason] = None
                        continue
                    done = await _round(hosts[case.method], plan, template, case, number)
                    rounds.append(done)
                    say(_line(plan, done))
    return FanOutReport(
        host=facts,
        image=plan.image,
        guest_kernel=guest_kernel,
        workload_bytes=plan.workload_bytes,
        summary=summarize_fan_out(rounds),
        skipped=tuple(omitted),
        rounds=tuple(rounds),
    )


def _line(plan: FanOutPlan, done: Round) -> str:
    return (
        f"{done.memory_bytes // MIB} MiB, {done.count} x {done.method} ({done.cache} cache), "
        f"round {done.number + 1} of {plan.rounds(done.count)}: {done.wall_ms:.0f} ms"
    )


async def _round(host: AsyncHost, plan: FanOutPlan, template: AsyncMachine, case: Case, number: int) -> Round:
    if case.method is Method.AHEAD and await template.start_ahead(case.count) < case.count:
        raise AssertionError("a boot and a spare do not use the copying host")
    captured = [host.local.rooms.directory(template.id) / name for name in (files.MEMORY, files.VMSTATE)]
    prepare = accounting.read_into_cache if case.cache is Cache.WARM else accounting.drop_from_cache
    await asyncio.to_thread(prepare, *captured)
    cached = None if case.method is Method.COLD else await asyncio.to_thread(accounting.cached_part, captured[0])
    async with tagged(host) as tags:
        available = accounting.available_bytes()
        before = Usage.now()
        start = time.perf_counter()
        if case.method is Method.COLD:
            grown = await _boot_all(host, plan.guest(case.memory_bytes), case.count, tags)
        else:
            grown = await _fork_all(host, template, case, tags)
        answers = await asyncio.gather(*(_first_answer(each.machine, start) for each in grown))
        wall_ms = (time.perf_counter() - start) * 1000
        spent = before.until(Usage.now())
        available -= accounting.available_bytes()
        ready = await host.stats()
        await asyncio.gather(*(dirty(each.machine, plan.workload_bytes) for each in grown))
        worked = await host.stats()
        machines = tuple(
            MachineSample(
                answered_ms=answered_ms,
                own_ms=each.own_ms,
                vmm_cpu_ms=cpu_ms,
                vmm_written_bytes=vmm_written,
                unique_ready_bytes=unique_bytes(ready[each.machine.name]),
                unique_worked_bytes=unique_bytes(worked[each.machine.name]),
                overhead_bytes=worked[each.machine.name].vmm_overhead_bytes,
                disk_written_bytes=each.disk_written_bytes,
                stages=each.stages,
            )
            for each, (answered_ms, cpu_ms, vmm_written) in zip(grown, answers, strict=True)
        )
    return Round(
        method=case.method,
        count=case.count,
        memory_bytes=case.memory_bytes,
        cache=case.cache,
        number=number,
        wall_ms=wall_ms,
        host_cpu_ms=spent.cpu_ms,
        host_written_bytes=spent.written_bytes,
        cached_before=cached,
        available_bytes=available,
        machines=machines,
    )


async def _boot_all(host: AsyncHost, guest: Guest, count: int, tags: dict[str, str]) -> list[_Grown]:
    slots = asyncio.Semaphore(_PARALLEL_BOOTS)

    async def one() -> _Grown:
        async with slots:
            start = time.perf_counter()
            machine = await boot(host, guest, tags)
            return _Grown(machine, (time.perf_counter() - start) * 1000, {}, 0)

    return list(await asyncio.gather(*(one() for _ in range(count))))


async def _fork_all(host: AsyncHost, template: AsyncMachine, case: Case, tags: dict[str, str]) -> list[_Grown]:
    shared = case.method in (Method.SHARED, Method.AHEAD)
    with contextlib.nullcontext() if shared else expected_copies():
        forks = await host.machine(template.record).fork(case.count, atomic=True, tags=tags)  # with this host's driver
    driver = host.local.rooms.drivers.chosen
    filled = driver.filled_bytes if isinstance(driver, CopyingDriver) else {}
    wanted = Sharing.HARDLINK if shared else Sharing.COPY
    grown = []
    for machine, result in zip(forks, forks.report.results, strict=True):
        if result.sharing is not wanted:
            raise GuestError(
                f"{result.name} was to be made by {case.method}, but its memory is: {result.sharing}",
                hint=result.sharing_reason
                or "see what the file system of the data directory can do with `coppice doctor`",
            )
        if result.started_ahead is not (case.method is Method.AHEAD):
            raise GuestError(f"the VMM of {result.name} was started at the wrong time", hint="run the benchmark again")
        written = result.disk_bytes_written + filled.get(machine.id, 0)
        grown.append(_Grown(machine, result.total_ms, result.stages, written))
    return grown


async def _first_answer(machine: AsyncMachine, start: float) -> tuple[float, float, int]:
    """Return the ms from `start` until a command answered, and the VMM's CPU ms and bytes written
    by then.
    """
    await answer(machine)
    answered_ms = (time.perf_counter() - start) * 1000
    if (vmm := machine.record.vmm) is None:
        raise AssertionError("a running instance has a VMM")
    return answered_ms, accounting.cpu_ms(vmm.pid), accounting.written_bytes(vmm.pid)


def unique_bytes(report: MemoryReport) -> int:
    """Return this machine's unshared resident RAM. For a private copy, its own file's pages count
    too.
    """
    return report.unique_bytes + (report.shared_bytes if report.sharing is Sharing.COPY else 0)
