"""The capture benchmark: the cost of a standby, by guest RAM and by memory dirtied since the
fork.
"""

from __future__ import annotations

from typing import Literal

from bench import accounting
from bench.accounting import Usage
from bench.percentiles import summarize_captures
from bench.records import Capture, CaptureBenchReport
from bench.trial import Guest, Say, boot, dirty, make_template, tagged
from coppice.client import AsyncHost, AsyncMachine
from coppice.model import GIB, MIB, Record


class CapturePlan(Record, frozen=True, kw_only=True):
    """The plan. A booted machine has RAM in its own file; a fork has a private mapping with dirty
    pages.
    """

    image: str
    kernel: str | None = None  # key of a guest kernel; None is Debian's
    memory_bytes: tuple[int, ...] = (256 * MIB, GIB, 4 * GIB)
    dirty_bytes: tuple[int, ...] = (0, 16 * MIB, 64 * MIB)
    rounds: int = 5


async def measure_capture(host: AsyncHost, plan: CapturePlan, say: Say) -> CaptureBenchReport:
    """Run the whole plan, alternating the kinds of source. All its machines are removed, also on
    failure.

    :raises NotFound: there is no such image
    """
    facts = await accounting.host_facts(host)
    captures: list[Capture] = []
    guest_kernel = ""
    for memory_bytes in plan.memory_bytes:
        async with tagged(host) as tags:
            say(f"{memory_bytes // MIB} MiB: booting the template")
            guest = Guest(image=plan.image, kernel=plan.kernel, memory_bytes=memory_bytes)
            template = await make_template(host, guest, tags)
            guest_kernel = template.record.machine.kernel
            for number in range(plan.rounds):
                for dirtied in (None, *plan.dirty_bytes):
                    done = await _capture(host, guest, template, dirtied, number)
                    say(
                        f"{memory_bytes // MIB} MiB, {done.source}, {done.dirtied_bytes // MIB} MiB dirtied, round {number + 1} of "
                        f"{plan.rounds}: paused {done.pause_ms:.0f} ms, {done.total_ms:.0f} ms in all"
                    )
                    captures.append(done)
    return CaptureBenchReport(
        host=facts,
        image=plan.image,
        guest_kernel=guest_kernel,
        summary=summarize_captures(captures),
        captures=tuple(captures),
    )


async def _capture(host: AsyncHost, guest: Guest, template: AsyncMachine, dirtied: int | None, number: int) -> Capture:
    """Measure one standby: of a fork with `dirtied` bytes, or of a booted machine if that is
    None.
    """
    source: Literal["boot", "fork"] = "boot" if dirtied is None else "fork"
    async with tagged(host) as tags:
        if dirtied is None:
            machine = await boot(host, guest, tags)
        else:
            machine = await template.fork_one(tags=tags)
        if dirtied:
            await dirty(machine, dirtied)
        before = Usage.now()
        report = await machine.standby()
        spent = before.until(Usage.now())
    return Capture(
        source=source,
        memory_bytes=guest.memory_bytes,
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
