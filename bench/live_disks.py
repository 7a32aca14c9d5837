"""The disk in a capture of a running machine: a new layer for the source, compared with a copy of its topmost file.

    python -m bench.live_disks --home DIR --image IMAGE --output benchmarks/live-disks.json
    python -m bench.live_disks --volume --home DIR --image IMAGE --output benchmarks/volume-live-disks.json

Two machines of the same kind run. Before each sample the guest writes a file anew, so that the
topmost file of its disk has the file's size. Then a snapshot of the disk alone is made, so that the
pause has no part for the memory: of one machine as it is; of the other one by a driver that hides
its ability to switch layers, so that the file is copied in the pause, as it was before. The samples
take turns. With `--volume` the file is on a volume, and each sample is a fork with a clone of it: the
pause has a part for the memory too. Compare figures within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.accounting import host_facts
from bench.records import HostFacts, parser_of, write_report
from coppice.client import AsyncHost
from coppice.machine import disk, disks
from coppice.model import MIB, Instance, Record, SnapshotKind, State, VolumeMount
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    RmRequest,
    RunRequest,
    SnapshotRequest,
    SnapshotRmRequest,
)
from coppice.vmm.driver import Capabilities
from coppice.vmm.qemu.driver import QemuDriver

_NAME = "live-disks-bench"
_PLACES = {False: "/root", True: "/cache"}  # of the file in the guest


class CopyingDisks(QemuDriver):
    """QEMU, as if a running machine could not go on in a new layer."""

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(super().capabilities, switches_layers=False)


class Way(Record, frozen=True, kw_only=True):
    """One way to get the disk of a running machine."""

    pause_median_ms: float
    pause_least_ms: float
    disk_median_ms: float  # of the pause, for the disks
    bytes_written: int  # by the host process for the disks of the snapshot or fork, the most of all samples


class LiveDisksReport(Record, frozen=True, kw_only=True):
    """One run."""

    host: HostFacts
    volume: bool  # whether the disk is a volume
    samples: int
    data_bytes: int  # in the topmost file of the source's disk
    layer: Way
    copy: Way


class Sample(NamedTuple):
    """One capture."""

    pause_ms: float
    disk_ms: float
    bytes_written: int


async def measure(
    homes: tuple[AsyncHost, AsyncHost], image: str, data_bytes: int, samples: int, *, volume: bool
) -> LiveDisksReport:
    """Make a machine for each way, capture them in turns, and remove everything."""
    ways: tuple[list[Sample], ...] = ([], [])
    sources: list[Instance] = []
    try:
        for number, host in enumerate(homes):
            name, mounts = f"{_NAME}-{number}", list[VolumeMount]()
            if volume:
                await host.volumes.create(name, size_bytes=2 * data_bytes)
                mounts.append(VolumeMount(volume=name, mount_path=_PLACES[volume]))
            request = RunRequest(image=image, command=["sleep", "infinity"], name=name, volumes=mounts)
            sources.append(await host.call(request))
        for _ in range(samples):
            for host, source, found in zip(homes, sources, ways, strict=True):
                await _fill(host, source, data_bytes, _PLACES[volume])
                found.append(await (_fork if volume else _snapshot)(host, source))
        layer, copy = (_way(found) for found in ways)
        return LiveDisksReport(
            host=await host_facts(homes[0]),
            volume=volume,
            samples=samples,
            data_bytes=data_bytes,
            layer=layer,
            copy=copy,
        )
    finally:
        for host, source in zip(homes, sources, strict=False):
            await host.call(RmRequest(instance=source.id))
            if volume:
                await host.volumes.rm(source.name)


async def _fill(host: AsyncHost, source: Instance, data_bytes: int, place: str) -> None:
    # direct: else the file would be in the guest's memory too, and in the capture of that
    script = f"dd if=/dev/zero of={place}/data bs=1M count={data_bytes // MIB} conv=notrunc,fsync oflag=direct"
    result = await host.call(ExecRequest(instance=source.id, argv=["sh", "-ec", script], timeout_s=600))
    if result.exit_code != 0:
        raise AssertionError(result)
    current = await host.call(GetRequest(instance=source.id))
    paths = disks.of(current)[-1].paths(host.local.rooms.directory(source.id))
    if disk.allocated(paths[-1:]) < data_bytes:
        raise AssertionError("the guest has written to another file")


async def _snapshot(host: AsyncHost, source: Instance) -> Sample:
    before = _written()
    kept = await host.call(SnapshotRequest(instance=source.id, kind=SnapshotKind.STOPPED))
    written = _written() - before
    await host.call(SnapshotRmRequest(snapshot=kept.id))
    return Sample(kept.pause_ms, kept.pause_ms, written)


async def _fork(host: AsyncHost, source: Instance) -> Sample:
    before = _written()
    request = ForkRequest(
        instance=source.id, target=State.STOPPED, from_running=True, volume_policy="clone", atomic=True
    )
    report = await host.call(request)
    written = _written() - before
    await host.call(RmRequest(instance=report.instances[0].id))
    if report.capture is None:
        raise AssertionError("a fork of a running machine reports its capture")
    return Sample(
        report.capture.pause_ms, report.capture.stages["disk"], max(0, written - report.capture.ram_bytes_written)
    )


def _written() -> int:
    """Return the bytes that this process has written to files since its start."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["write_bytes"]) - int(lines["cancelled_write_bytes"])


def _way(samples: Sequence[Sample]) -> Way:
    return Way(
        pause_median_ms=round(statistics.median(each.pause_ms for each in samples), 1),
        pause_least_ms=round(min(each.pause_ms for each in samples), 1),
        disk_median_ms=round(statistics.median(each.disk_ms for each in samples), 1),
        bytes_written=max(each.bytes_written for each in samples),
    )


async def _run(options: argparse.Namespace) -> LiveDisksReport:
    async with (
        AsyncHost(options.home, driver=QemuDriver(), background="off") as host,
        AsyncHost(options.home, driver=CopyingDisks(), background="off") as copying,
    ):
        return await measure((host, copying), options.image, options.data, options.samples, volume=options.volume)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the report."""
    parser = parser_of(__doc__, samples=5)
    parser.add_argument("--data", type=int, default=256 * MIB, help="bytes on the source's disk")
    parser.add_argument("--volume", action="store_true", help="put the data on a volume")
    options = parser.parse_args(arguments)
    write_report(asyncio.run(_run(options)), options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
