"""The capture benchmark: what a standby costs, by guest RAM and by what the guest has dirtied since it was forked."""

from __future__ import annotations

from typing import Literal

from coppice.bench import accounting
from coppice.bench.accounting import Usage
from coppice.bench.percentiles import summarize_captures
from coppice.bench.records import Capture, CaptureBenchReport
from coppice.bench.trial import Say, boot, dirty, make_template, tagged
from coppice.host import AsyncHost
from coppice.model import GIB, MIB, Instance, Record


class CapturePlan(Record, frozen=True, kw_only=True):
    """What to measure. A machine that was booted has RAM in its own file; a fork has a private mapping, with `dirty_bytes` dirtied."""

    image: str
    memory_bytes: tuple[int, ...] = (256 * MIB, GIB, 4 * GIB)
    dirty_bytes: tuple[int, ...] = (0, 16 * MIB, 64 * MIB)
    rounds: int = 5


async def measure_capture(host: AsyncHost, plan: CapturePlan, say: Say) -> CaptureBenchReport:
    """Run the whole plan, the kinds of source in turn; every machine it makes is removed, also when it fails.

    :raises NotFound: there is no such image
    """
    facts = await accounting.host_facts(host)
    captures: list[Capture] = []
    for memory_bytes in plan.memory_bytes:
        async with tagged(host) as tags:
            say(f"{memory_bytes // MIB} MiB: booting the template")
            template = await make_template(host, plan.image, memory_bytes, tags)
            for number in range(plan.rounds):
                for dirtied in (None, *plan.dirty_bytes):
                    done = await _capture(host, plan.image, template, dirtied, number)
                    say(
                        f"{memory_bytes // MIB} MiB, {done.source}, {done.dirtied_bytes // MIB} MiB dirtied, round {number + 1} of "
                        f"{plan.rounds}: paused {done.pause_ms:.0f} ms, {done.total_ms:.0f} ms in all"
                    )
                    captures.append(done)
    return CaptureBenchReport(
        host=facts, image=plan.image, summary=summarize_captures(captures), captures=tuple(captures)
    )


async def _capture(host: AsyncHost, image: str, template: Instance, dirtied: int | None, number: int) -> Capture:
    """One standby, of a fork that has dirtied so much, or of a machine that was just booted where `dirtied` is None."""
    memory_bytes = template.machine.memory_bytes
    source: Literal["boot", "fork"] = "boot" if dirtied is None else "fork"
    async with tagged(host) as tags:
        if dirtied is None:
            instance = await boot(host, image, memory_bytes, tags)
        else:
            (instance,) = (await host.fork(template, atomic=True, tags=tags)).instances
        if dirtied:
            await dirty(host, instance, dirtied)
        before = Usage.now()
        _, report = await host.standby(instance)
        spent = before.until(Usage.now())
    return Capture(
        source=source,
        memory_bytes=memory_bytes,
        dirtied_bytes=dirtied or 0,
        number=number,
        pause_ms=report.pause_ms,
        total_ms=report.total_ms,
        ram_written_bytes=report.ram_bytes_written,
        dirty_bytes=report.dirty_bytes,
        host_cpu_ms=spent.cpu_ms,
        host_written_bytes=spent.written_bytes,
        stages=report.stages,
    )
