"""The fan-out benchmark: N machines by a cold boot, by two kinds of copying fork, and by a shared fork, interleaved in one run."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from coppice.bench import accounting
from coppice.bench.accounting import Usage
from coppice.bench.copying import CopyingDriver, expected_copies
from coppice.bench.percentiles import summarize_fan_out
from coppice.bench.records import Cache, FanOutReport, MachineSample, Method, Round, Skipped
from coppice.bench.trial import Say, answer, boot, dirty, make_template, tagged
from coppice.errors import GuestError
from coppice.host import AsyncHost
from coppice.host.spares import MOST
from coppice.model import GIB, MIB, Instance, MemoryReport, Record, Sharing
from coppice.vmm import driver as files

# As many at once as a fan-out grows, so that the machines of a cold boot wait for each other no more than forks do.
_PARALLEL_BOOTS = 2 * (os.cpu_count() or 1)
# A boot reads no mem-file, and a VMM that was started ahead has read some of it.
_WARM_ONLY = (Method.COLD, Method.AHEAD)


class FanOutPlan(Record, frozen=True, kw_only=True):
    """What to measure."""

    image: str
    counts: tuple[int, ...] = (1, 4, 16)
    memory_bytes: tuple[int, ...] = (256 * MIB, GIB, 4 * GIB)
    methods: tuple[Method, ...] = tuple(Method)
    caches: tuple[Cache, ...] = tuple(Cache)
    samples: int = 8  # machines per case, at least
    min_rounds: int = 2
    workload_bytes: int = 16 * MIB
    copy_limit_bytes: int = 4 * GIB  # a round of full copies that would write more is skipped

    def rounds(self, count: int) -> int:
        """How many rounds of `count` machines give enough samples."""
        return max(self.min_rounds, math.ceil(self.samples / count))


class Case(Record, frozen=True, kw_only=True):
    """One request to measure."""

    method: Method
    count: int
    memory_bytes: int
    cache: Cache


class _Grown(NamedTuple):
    instance: Instance
    own_ms: float
    stages: dict[str, float]
    disk_written_bytes: int


def cases(plan: FanOutPlan, memory_bytes: int) -> Iterator[tuple[int, Case]]:
    """All rounds for one memory size, numbered: the methods take turns, and each round begins with another one."""
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
    """Why a case is not run, if it is not."""
    if case.method is Method.AHEAD and case.count > MOST:
        reason = f"a host starts no more than {MOST} machines ahead"
        return Skipped(method=case.method, count=case.count, memory_bytes=case.memory_bytes, reason=reason)
    size = case.count * case.memory_bytes
    if case.method is not Method.COPY or size <= plan.copy_limit_bytes:
        return None
    reason = f"it would write {size // MIB} MiB, more than the limit of {plan.copy_limit_bytes // MIB} MiB"
    return Skipped(method=case.method, count=case.count, memory_bytes=case.memory_bytes, reason=reason)


async def measure_fan_out(host: AsyncHost, plan: FanOutPlan, say: Say) -> FanOutReport:
    """Run the whole plan; every machine it makes is removed, also when it fails.

    :raises NotFound: there is no such image
    :raises CoppiceError: a machine could not be made; a benchmark that loses machines measures nothing
    """
    facts = await accounting.host_facts(host)
    rounds: list[Round] = []
    omitted: dict[Skipped, None] = {}
    async with contextlib.AsyncExitStack() as stack:
        hosts = {Method.COLD: host, Method.SHARED: host, Method.AHEAD: host}
        for method in (Method.COPY, Method.SPARSE):
            driver = CopyingDriver(host.rooms.driver, full=method is Method.COPY)
            hosts[method] = await stack.enter_async_context(AsyncHost(host.home, driver=driver, background="off"))
        for memory_bytes in plan.memory_bytes:
            async with tagged(host) as tags:
                say(f"{memory_bytes // MIB} MiB: booting the template")
                template = await make_template(host, plan.image, memory_bytes, tags)
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


async def _round(host: AsyncHost, plan: FanOutPlan, template: Instance, case: Case, number: int) -> Round:
    if case.method is Method.AHEAD and await host.start_ahead(template, case.count) < case.count:
        raise AssertionError("another host has no part in these")
    captured = [host.rooms.directory(template.id) / name for name in (files.MEMORY, files.VMSTATE)]
    prepare = accounting.read_into_cache if case.cache is Cache.WARM else accounting.drop_from_cache
    await asyncio.to_thread(prepare, *captured)
    cached = None if case.method is Method.COLD else await asyncio.to_thread(accounting.cached_part, captured[0])
    async with tagged(host) as tags:
        before = Usage.now()
        start = time.perf_counter()
        if case.method is Method.COLD:
            grown = await _boot_all(host, plan.image, case, tags)
        else:
            grown = await _fork_all(host, template, case, tags)
        answers = await asyncio.gather(*(_first_answer(host, machine.instance, start) for machine in grown))
        wall_ms = (time.perf_counter() - start) * 1000
        spent = before.until(Usage.now())
        ready = await host.stats()
        await asyncio.gather(*(dirty(host, machine.instance, plan.workload_bytes) for machine in grown))
        worked = await host.stats()
        machines = tuple(
            MachineSample(
                answered_ms=answered_ms,
                own_ms=machine.own_ms,
                vmm_cpu_ms=cpu_ms,
                vmm_written_bytes=vmm_written,
                unique_ready_bytes=unique_bytes(ready[machine.instance.name]),
                unique_worked_bytes=unique_bytes(worked[machine.instance.name]),
                overhead_bytes=worked[machine.instance.name].vmm_overhead_bytes,
                disk_written_bytes=machine.disk_written_bytes,
                stages=machine.stages,
            )
            for machine, (answered_ms, cpu_ms, vmm_written) in zip(grown, answers, strict=True)
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
        machines=machines,
    )


async def _boot_all(host: AsyncHost, image: str, case: Case, tags: dict[str, str]) -> list[_Grown]:
    slots = asyncio.Semaphore(_PARALLEL_BOOTS)

    async def one() -> _Grown:
        async with slots:
            start = time.perf_counter()
            instance = await boot(host, image, case.memory_bytes, tags)
            return _Grown(instance, (time.perf_counter() - start) * 1000, {}, 0)

    return list(await asyncio.gather(*(one() for _ in range(case.count))))


async def _fork_all(host: AsyncHost, template: Instance, case: Case, tags: dict[str, str]) -> list[_Grown]:
    shared = case.method in (Method.SHARED, Method.AHEAD)
    with contextlib.nullcontext() if shared else expected_copies():
        report = await host.fork(template, count=case.count, atomic=True, tags=tags)
    driver = host.rooms.driver
    filled = driver.filled_bytes if isinstance(driver, CopyingDriver) else {}
    wanted = Sharing.HARDLINK if shared else Sharing.COPY
    grown = []
    for result in report.results:
        if result.instance is None or result.sharing is not wanted:
            raise GuestError(
                f"{result.name} was to be made by {case.method}, but its memory is: {result.sharing}",
                hint=result.sharing_reason
                or "see what the file system of the data directory can do with `coppice doctor`",
            )
        if result.started_ahead is not (case.method is Method.AHEAD):
            raise GuestError(f"the VMM of {result.name} was not started when it should have been", hint="run it again")
        written = result.disk_bytes_written + filled.get(result.instance.id, 0)
        grown.append(_Grown(result.instance, result.total_ms, result.stages, written))
    return grown


async def _first_answer(host: AsyncHost, instance: Instance, start: float) -> tuple[float, float, int]:
    """When a command had answered, in milliseconds since `start`; and what the VMM had spent and written by then."""
    await answer(host, instance)
    answered_ms = (time.perf_counter() - start) * 1000
    if instance.vmm is None:
        raise AssertionError("a running instance has a VMM")
    return answered_ms, accounting.cpu_ms(instance.vmm.pid), accounting.written_bytes(instance.vmm.pid)


def unique_bytes(report: MemoryReport) -> int:
    """Resident guest RAM that only this machine has. Of a private copy that is all of it, the pages of its own file included."""
    return report.unique_bytes + (report.shared_bytes if report.sharing is Sharing.COPY else 0)
