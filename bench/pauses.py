"""The pause of a fork of a running fork: what is done before or after the pause, compared with all of it in the pause.

    python -m bench.pauses --home DIR --image IMAGE --output benchmarks/pauses.json

Three forks of one template run, and all dirty the same amount of memory. Each is forked in turns: one
as it is; one by a driver that hides that its VMM's writes can be observed, so that all private pages
are copied in the pause, as on kernels before 6.7; one by a driver that does all of the switch to a new
layer of the disk in the pause. First all guests are idle, then in each a process writes to 8 MiB again
and again.
Compare figures within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.accounting import host_facts
from bench.records import HostFacts, parser_of, write_report
from bench.trial import Guest, dirty, make_template, tagged
from coppice.client import AsyncHost, AsyncMachine
from coppice.model import MIB, CaptureReport, Record, State
from coppice.requests import ForkRequest, RmRequest
from coppice.vmm.driver import Capabilities
from coppice.vmm.qemu.driver import QemuDriver

_WRITER = "while :; do dd if=/dev/zero of=/dev/shm/busy bs=1M count=8 conv=notrunc 2>/dev/null; sleep 0.05; done"


class InPause(QemuDriver):
    """QEMU, as if its writes could not be observed."""

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(super().capabilities, observable=False)


class SwitchInPause(QemuDriver):
    """QEMU, as if nothing of the switch to a new layer could be done before or after the pause."""

    async def prepare_switch(self, directory: Path, disk: Sequence[str]) -> None:
        pass

    async def switch_layers(self, directory: Path, disks: Sequence[Sequence[str]]) -> None:
        for disk in disks:
            await super().prepare_switch(directory, disk)
        await super().switch_layers(directory, disks)
        for disk in disks:
            await super().finish_switch(directory, disk)

    async def finish_switch(self, directory: Path, disk: Sequence[str]) -> None:
        pass


class Way(Record, frozen=True, kw_only=True):
    """One way to capture."""

    pause_median_ms: float
    pause_least_ms: float
    memory_median_ms: float  # of the pause, for the pages
    disk_median_ms: float  # of the pause, for the disk
    disk_least_ms: float
    total_median_ms: float
    dirty_median_bytes: int


class Case(Record, frozen=True, kw_only=True):
    """One kind of guest."""

    name: str
    ahead: Way
    in_pause: Way  # the pages
    switch_in_pause: Way  # the disk


class PausesReport(Record, frozen=True, kw_only=True):
    """One run."""

    host: HostFacts
    samples: int
    dirtied_bytes: int
    cases: tuple[Case, ...]


async def measure(hosts: tuple[AsyncHost, ...], plan: argparse.Namespace) -> PausesReport:
    """Run the whole plan. All its machines are removed, also on failure."""
    cases = []
    async with tagged(hosts[0]) as tags:
        template = await make_template(hosts[0], Guest(image=plan.image, kernel=None, memory_bytes=plan.memory), tags)
        for name in ("idle guest", "guest that writes"):
            machines = [await _machine(host, template.record.id, plan.dirty, tags) for host in hosts]
            if name == "guest that writes":
                for machine in machines:
                    await machine.exec(("sh", "-c", f"({_WRITER}) >/dev/null 2>&1 </dev/null &"), timeout_s=60)
            found: tuple[list[CaptureReport], ...] = ([], [], [])
            for _ in range(plan.samples):
                for host, machine, reports in zip(hosts, machines, found, strict=True):
                    reports.append(await _fork(host, machine, tags))
            ahead, in_pause, switch_in_pause = map(_way, found)
            cases.append(Case(name=name, ahead=ahead, in_pause=in_pause, switch_in_pause=switch_in_pause))
            sys.stderr.write(msgspec.json.encode(cases[-1]).decode() + "\n")
            for machine in machines:
                await machine.rm()
    return PausesReport(
        host=await host_facts(hosts[0]), samples=plan.samples, dirtied_bytes=plan.dirty, cases=tuple(cases)
    )


async def _machine(host: AsyncHost, template: str, dirtied: int, tags: dict[str, str]) -> AsyncMachine:
    machine = await (await host.get(template)).fork_one(tags=tags)
    await dirty(machine, dirtied)
    return machine


async def _fork(host: AsyncHost, machine: AsyncMachine, tags: dict[str, str]) -> CaptureReport:
    report = await host.call(ForkRequest(instance=machine.id, from_running=True, target=State.STANDBY, tags=tags))
    for result in report.results:
        await host.call(RmRequest(instance=result.name))
    if report.capture is None:
        raise AssertionError("a fork of a running machine reports its capture")
    return report.capture


def _way(reports: Sequence[CaptureReport]) -> Way:
    def median(value: Callable[[CaptureReport], float]) -> float:
        return round(statistics.median(map(value, reports)), 1)

    return Way(
        pause_median_ms=median(lambda report: report.pause_ms),
        pause_least_ms=round(min(report.pause_ms for report in reports), 1),
        memory_median_ms=median(lambda report: report.stages["memory"]),
        disk_median_ms=median(lambda report: report.stages["disk"]),
        disk_least_ms=round(min(report.stages["disk"] for report in reports), 1),
        total_median_ms=median(lambda report: report.total_ms),
        dirty_median_bytes=int(median(lambda report: report.dirty_bytes)),
    )


async def _run(options: argparse.Namespace) -> PausesReport:
    async with (
        AsyncHost(options.home, driver=QemuDriver(), background="off") as host,
        AsyncHost(options.home, driver=InPause(), background="off") as copying,
        AsyncHost(options.home, driver=SwitchInPause(), background="off") as switching,
    ):
        return await measure((host, copying, switching), options)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the report."""
    parser = parser_of(__doc__, samples=9)
    parser.add_argument("--memory", type=int, default=512 * MIB, help="bytes of the guests' memory")
    parser.add_argument("--dirty", type=int, default=64 * MIB, help="bytes that each guest dirties")
    options = parser.parse_args(arguments)
    write_report(asyncio.run(_run(options)), options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
