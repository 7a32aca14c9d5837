"""The disk in a capture of a running machine: a new layer for the source, compared with a copy of its topmost file.

    python -m bench.live_disks --home DIR --image IMAGE --output benchmarks/live-disks.json

Two machines of the same kind run. Before each sample the guest writes a file anew, so that the
topmost file of its disk has the file's size. Then a snapshot of the disk alone is made, so that the
pause has no part for the memory: of one machine as it is; of the other one by a driver that hides
its ability to switch layers, so that the file is copied in the pause, as it was before. The samples
take turns. Compare figures within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.accounting import host_facts
from bench.records import HostFacts, write_report
from coppice.client import AsyncHost
from coppice.machine import disk, disks
from coppice.model import MIB, Instance, Record, SnapshotKind
from coppice.requests import ExecRequest, GetRequest, RmRequest, RunRequest, SnapshotRequest, SnapshotRmRequest
from coppice.vmm.driver import Capabilities
from coppice.vmm.qemu.driver import QemuDriver

_NAME = "live-disks-bench"


class CopyingDisks(QemuDriver):
    """QEMU, as if a running machine could not go on in a new layer."""

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(super().capabilities, switches_layers=False)


class Way(Record, frozen=True, kw_only=True):
    """One way to get the disk of a running machine."""

    pause_median_ms: float
    pause_least_ms: float
    bytes_written: int  # by the host process for all of the snapshot, the most of all samples


class LiveDisksReport(Record, frozen=True, kw_only=True):
    """One run."""

    host: HostFacts
    samples: int
    data_bytes: int  # in the topmost file of the source's disk
    layer: Way
    copy: Way


async def measure(homes: tuple[AsyncHost, AsyncHost], image: str, data_bytes: int, samples: int) -> LiveDisksReport:
    """Make a machine for each way, make snapshots in turns, and remove everything."""
    ways: tuple[list[tuple[float, int]], ...] = ([], [])
    sources = [
        await host.call(RunRequest(image=image, command=["sleep", "infinity"], name=f"{_NAME}-{number}"))
        for number, host in enumerate(homes)
    ]
    try:
        for _ in range(samples):
            for host, source, found in zip(homes, sources, ways, strict=True):
                await _fill(host, source, data_bytes)
                found.append(await _snapshot(host, source))
        layer, copy = (_way(found) for found in ways)
        return LiveDisksReport(
            host=await host_facts(homes[0]), samples=samples, data_bytes=data_bytes, layer=layer, copy=copy
        )
    finally:
        for host, source in zip(homes, sources, strict=True):
            await host.call(RmRequest(instance=source.id))


async def _fill(host: AsyncHost, source: Instance, data_bytes: int) -> None:
    script = f"dd if=/dev/zero of=/root/data bs=1M count={data_bytes // MIB} conv=notrunc,fsync"
    result = await host.call(ExecRequest(instance=source.id, argv=["sh", "-ec", script], timeout_s=600))
    if result.exit_code != 0:
        raise AssertionError(result)
    current = await host.call(GetRequest(instance=source.id))
    paths = disks.paths(host.local.rooms.directory(source.id), disks.of(current))
    if disk.allocated(paths[-1:]) < data_bytes:
        raise AssertionError("the guest has written to another file")


async def _snapshot(host: AsyncHost, source: Instance) -> tuple[float, int]:
    before = _written()
    kept = await host.call(SnapshotRequest(instance=source.id, kind=SnapshotKind.STOPPED))
    written = _written() - before
    await host.call(SnapshotRmRequest(snapshot=kept.id))
    if kept.pause_ms is None:
        raise AssertionError("a snapshot of a running machine reports its pause")
    return kept.pause_ms, written


def _written() -> int:
    """Return the bytes that this process has written to files since its start."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["write_bytes"]) - int(lines["cancelled_write_bytes"])


def _way(samples: Sequence[tuple[float, int]]) -> Way:
    pauses, written = zip(*samples, strict=True)
    return Way(
        pause_median_ms=round(statistics.median(pauses), 1),
        pause_least_ms=round(min(pauses), 1),
        bytes_written=max(written),
    )


async def _run(options: argparse.Namespace) -> LiveDisksReport:
    async with (
        AsyncHost(options.home, driver=QemuDriver(), background="off") as host,
        AsyncHost(options.home, driver=CopyingDisks(), background="off") as copying,
    ):
        return await measure((host, copying), options.image, options.data, options.samples)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--image", default="debian")
    parser.add_argument("--data", type=int, default=256 * MIB, help="bytes on the source's disk")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    write_report(asyncio.run(_run(options)), options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
