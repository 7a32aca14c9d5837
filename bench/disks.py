"""The disk of a fork, compared with a copy of its source's disk.

    python -m bench.disks --home DIR --image IMAGE --output benchmarks/disks.json

The source is a machine at rest whose file system has a file of random bytes. Forks to Stopped are made one
after the other, and after each a sparse copy of the source's disk in the same file system, as forks
were made before disks had layers. Compare figures within one run only: the speed of a shared host
changes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.accounting import host_facts
from bench.records import HostFacts, write_report
from coppice.client import AsyncHost
from coppice.linux.clone import clone_file
from coppice.linux.e2fs import run_e2fs
from coppice.machine import disk
from coppice.model import GIB, Instance, Record, State
from coppice.requests import ForkRequest, RmRequest, RunRequest

_SOURCE, _FORK = "disks-bench", "disks-bench-fork"


class Way(Record, frozen=True, kw_only=True):
    """One way to get a disk."""

    place_median_ms: float
    place_least_ms: float
    bytes_written: int  # the most of all samples


class DisksReport(Record, frozen=True, kw_only=True):
    """One run."""

    host: HostFacts
    samples: int
    data_bytes: int  # in the file on the source's disk
    allocated_bytes: int  # of the source's disk
    layer: Way
    copy: Way
    time_ratio: float  # of the medians: copy divided by layer
    bytes_ratio: float


async def measure(host: AsyncHost, image: str, data_bytes: int, samples: int) -> DisksReport:
    """Make the source, fork and copy its disk in turns, and remove everything."""
    source = await host.call(RunRequest(image=image, name=_SOURCE, overlay_bytes=2 * data_bytes, start=False))
    try:
        directory = host.local.rooms.directory(source.id)
        await asyncio.to_thread(_fill, directory / "overlay.raw", data_bytes)
        layers, copies = [], []
        await _fork(host, source)  # the first one freezes the disk, and makes the empty layer of this size
        for _ in range(samples):
            layers.append(await _fork(host, source))
            copies.append(await asyncio.to_thread(_copy, directory / "overlay.raw"))
        layer, copy = _way(layers), _way(copies)
        return DisksReport(
            host=await host_facts(host),
            samples=samples,
            data_bytes=data_bytes,
            allocated_bytes=disk.allocated(disk.paths(directory, source.disk_layers)),
            layer=layer,
            copy=copy,
            time_ratio=round(copy.place_median_ms / layer.place_median_ms, 1),
            bytes_ratio=round(copy.bytes_written / max(layer.bytes_written, 1), 1),
        )
    finally:
        await host.call(RmRequest(instance=source.id))


def _fill(overlay: Path, data_bytes: int) -> None:
    """Write a file of random bytes to the file system on a disk."""
    with tempfile.NamedTemporaryFile(dir=overlay.parent) as file:
        for _ in range(data_bytes >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        run_e2fs("debugfs", "-w", "-R", f"write {file.name} data", str(overlay), deadline_s=300)


async def _fork(host: AsyncHost, source: Instance) -> tuple[float, int]:
    request = ForkRequest(instance=source.id, names=[_FORK], target=State.STOPPED, atomic=True)
    (result,) = (await host.call(request)).results
    if result.instance is None:
        raise AssertionError("an atomic request raises if a fork fails")
    await host.call(RmRequest(instance=result.instance.id))
    return result.stages["place"], result.disk_bytes_written


def _copy(overlay: Path) -> tuple[float, int]:
    out = overlay.with_name("copy.tmp")
    begin = time.perf_counter()
    written = clone_file(overlay, out, sync=False).bytes_written
    spent = (time.perf_counter() - begin) * 1000
    out.unlink()
    return spent, written


def _way(samples: Sequence[tuple[float, int]]) -> Way:
    times = [spent for spent, _ in samples]
    return Way(
        place_median_ms=round(statistics.median(times), 3),
        place_least_ms=round(min(times), 3),
        bytes_written=max(written for _, written in samples),
    )


async def _run(options: argparse.Namespace) -> DisksReport:
    async with AsyncHost(options.home, background="off") as host:
        return await measure(host, options.image, options.data, options.samples)


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--image", default="debian")
    parser.add_argument("--data", type=int, default=GIB, help="bytes on the source's disk")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    report = asyncio.run(_run(options))
    write_report(report, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
