"""The disk of a fork, compared with a copy of its source's disk.

    python -m bench.disks --home DIR --image IMAGE --output benchmarks/disks.json
    python -m bench.disks --volume --home DIR --image IMAGE --output benchmarks/volume-disks.json

The source is a template whose file system has a file of random bytes. With `--volume` it is a standby
whose volume has the file, and each fork gets a clone of the volume. Forks are started one after the
other, and after some of them a sparse copy of the source's disk is made in the same file system, as
forks were made before disks had layers. After each copy the file system is synced: else the next forks
would wait for the copy's data. Compare figures within one run only: the speed of a shared host changes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.accounting import host_facts
from bench.records import HostFacts, parser_of, write_report
from coppice.client import AsyncHost
from coppice.errors import NotFound
from coppice.linux.clone import clone_file
from coppice.linux.e2fs import run_e2fs
from coppice.machine import disk, disks
from coppice.model import GIB, Instance, Record, VolumeMount
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    PromoteRequest,
    RmRequest,
    RunRequest,
    StandbyRequest,
    StartRequest,
)

_SOURCE, _FORK, _VOLUME = "disks-bench", "disks-bench-fork", "disks-bench-volume"
_FORKS_PER_COPY = 5


class Way(Record, frozen=True, kw_only=True):
    """One way to get a disk."""

    place_median_ms: float
    place_least_ms: float
    bytes_written: int  # the most of all samples
    samples: int


class DisksReport(Record, frozen=True, kw_only=True):
    """One run."""

    host: HostFacts
    volume: bool  # whether the disk is a volume
    data_bytes: int  # in the file on the source's disk
    allocated_bytes: int  # of the source's disk
    layer: Way
    own_bytes: int  # of a fork's own layer of the disk when its guest has answered a command, the most of all samples
    copy: Way
    time_ratio: float  # of the medians: copy divided by layer
    bytes_ratio: float


async def measure(host: AsyncHost, image: str, data_bytes: int, samples: int, *, volume: bool) -> DisksReport:
    """Make the source, fork and copy its disk in turns, and remove everything."""
    mounts = [VolumeMount(volume=_VOLUME, mount_path="/cache")] if volume else []
    if volume:
        await host.volumes.create(_VOLUME, size_bytes=2 * data_bytes)
    try:
        request = RunRequest(image=image, name=_SOURCE, overlay_bytes=2 * data_bytes, volumes=mounts, start=False)
        source = await host.call(request)
        directory = host.local.rooms.directory(source.id)
        raw = disks.of(source)[-1].paths(directory)[0]
        await asyncio.to_thread(_fill, raw, data_bytes)
        await host.call(StartRequest(instance=source.id))
        source = (await host.call(StandbyRequest(instance=source.id))).instance
        if not volume:
            source = await host.call(PromoteRequest(instance=source.id))
        layers, copies, own = [], [], []
        await _fork(host, source)  # the first one freezes the disk, and makes the empty layer of this size
        for number in range(samples):
            if number % _FORKS_PER_COPY == 0:
                copies.append(await asyncio.to_thread(_copy, raw))
            spent, written, own_bytes = await _fork(host, source)
            layers.append((spent, written))
            own.append(own_bytes)
        layer, copy = _way(layers), _way(copies)
        return DisksReport(
            host=await host_facts(host),
            volume=volume,
            data_bytes=data_bytes,
            allocated_bytes=disk.allocated([raw]),
            layer=layer,
            own_bytes=max(own),
            copy=copy,
            time_ratio=round(copy.place_median_ms / layer.place_median_ms, 1),
            bytes_ratio=round(copy.bytes_written / max(layer.bytes_written, 1), 1),
        )
    finally:
        with contextlib.suppress(NotFound):
            await host.call(RmRequest(instance=_SOURCE))
        if volume:
            await host.volumes.rm(_VOLUME)


def _fill(overlay: Path, data_bytes: int) -> None:
    """Write a file of random bytes to the file system on a disk."""
    with tempfile.NamedTemporaryFile(dir=overlay.parent) as file:
        for _ in range(data_bytes >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        run_e2fs("debugfs", "-w", "-R", f"write {file.name} data", str(overlay), deadline_s=300)


async def _fork(host: AsyncHost, source: Instance) -> tuple[float, int, int]:
    """Fork the template, ask the fork, and remove it. Return ms and bytes of its place, and the bytes of its layer."""
    request = ForkRequest(instance=source.id, names=[_FORK], volume_policy="clone", atomic=True)
    (result,) = (await host.call(request)).results
    if result.instance is None or result.started_ahead:
        raise AssertionError("an atomic request raises if a fork fails, and this host starts none ahead")
    answer = await host.call(ExecRequest(instance=result.instance.id, argv=["true"], timeout_s=60))
    if answer.exit_code:
        raise AssertionError(answer)
    paths = disks.of(result.instance)[-1].paths(host.local.rooms.directory(result.instance.id))
    own_bytes = disk.allocated(paths[-1:])
    await host.call(RmRequest(instance=result.instance.id))
    return result.stages["place"], result.disk_bytes_written, own_bytes


def _copy(overlay: Path) -> tuple[float, int]:
    out = overlay.with_name("copy.tmp")
    begin = time.perf_counter()
    written = clone_file(overlay, out, sync=False).bytes_written
    spent = (time.perf_counter() - begin) * 1000
    out.unlink()
    os.sync()
    return spent, written


def _way(samples: Sequence[tuple[float, int]]) -> Way:
    times = [spent for spent, _ in samples]
    return Way(
        place_median_ms=round(statistics.median(times), 3),
        place_least_ms=round(min(times), 3),
        bytes_written=max(written for _, written in samples),
        samples=len(samples),
    )


async def _run(options: argparse.Namespace) -> DisksReport:
    async with AsyncHost(options.home, background="off", spares=0) as host:
        return await measure(host, options.image, options.data, options.samples, volume=options.volume)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the report."""
    parser = parser_of(__doc__, samples=30)
    parser.add_argument("--data", type=int, default=GIB, help="bytes on the source's disk")
    parser.add_argument("--volume", action="store_true", help="put the data on a volume")
    options = parser.parse_args(arguments)
    report = asyncio.run(_run(options))
    write_report(report, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
