"""Schemas of benchmark results: facts of the host, all raw samples, and their summary.

`schema` names the version of a document. A change of meaning is a new version.
"""

from __future__ import annotations

import argparse
from enum import StrEnum
from pathlib import Path
from typing import Literal

import msgspec

from coppice.linux.files import os_errors, publish, temporary_beside
from coppice.model import Record, to_json


class Method(StrEnum):
    """How a running machine is made."""

    COLD = "cold-boot"  # boot the image
    COPY = "full-copy"  # fork with a private copy of the whole mem-file, as by `cp`
    SPARSE = "sparse-copy"  # the same without blocks of zeros, as by `cp --sparse=always`
    SHARED = "shared-fork"  # fork with a hard link, as Coppice does it
    AHEAD = "started-ahead"  # the same, with a VMM that was started before the request


class Cache(StrEnum):
    """Whether the template's mem-file and vmstate were in the page cache when the forks began."""

    WARM = "warm"
    COLD = "cold"


class HostFacts(Record, frozen=True, kw_only=True):
    """The facts that the numbers depend on."""

    date: str  # ISO 8601, UTC
    coppice_version: str
    cpu_model: str
    cpu_threads: int
    ram_bytes: int
    kernel: str
    filesystem: str  # of the data directory
    driver: str
    vmm_version: str
    accel: str
    load_average: tuple[float, float, float]  # before the run
    python: str


class MachineSample(Record, frozen=True, kw_only=True):
    """One machine of a round of `count`."""

    answered_ms: float  # from the request for the round until a command in this machine answered
    own_ms: float  # from its own turn until it was Running: without waiting for a slot, and without the command
    vmm_cpu_ms: float  # user and system time of its VMM until the command answered, in ticks of 10 ms
    vmm_written_bytes: int  # by the VMM process, from /proc/PID/io; pages dirtied in a mapped file count
    unique_ready_bytes: int  # unshared guest RAM when the command had answered
    unique_worked_bytes: int  # the same after the workload
    overhead_bytes: int  # private memory of the VMM outside guest RAM, after the workload
    disk_written_bytes: (
        int  # by the fork operation: what its report says, and the holes that `full-copy` fills; 0 for a boot
    )
    stages: dict[str, float] = {}  # milliseconds


class Round(Record, frozen=True, kw_only=True):
    """One request for `count` machines, by one method."""

    method: Method
    count: int
    memory_bytes: int
    cache: Cache
    number: int
    wall_ms: float  # from the request until a command in each machine answered
    host_cpu_ms: float  # user and system time of the requesting process and its helpers, without VMMs
    host_written_bytes: int  # by that process, from /proc/self/io
    cached_before: float | None  # cached fraction of the mem-file's data before; None for a boot
    available_bytes: int | None = None  # how much the host's MemAvailable fell; missing in older results
    machines: tuple[MachineSample, ...]


class Skipped(Record, frozen=True, kw_only=True):
    """A skipped case, with the reason."""

    method: Method
    count: int
    memory_bytes: int
    reason: str


class Percentiles(Record, frozen=True, kw_only=True):
    """Nearest-rank percentiles: each is a measured value. With fewer than 100 samples p99 is the
    largest.
    """

    samples: int
    p50: float
    p90: float
    p99: float


class FanOutSummary(Record, frozen=True, kw_only=True):
    """All rounds of one case. Figures are per machine unless noted."""

    method: Method
    count: int
    memory_bytes: int
    cache: Cache
    rounds: int
    answered_ms: Percentiles
    own_ms: Percentiles
    wall_ms: Percentiles  # of whole rounds
    vmm_cpu_ms: Percentiles
    host_cpu_ms: Percentiles  # of a round, divided by its count
    unique_ready_bytes: Percentiles
    unique_worked_bytes: Percentiles
    disk_written_bytes: Percentiles
    available_bytes: Percentiles | None = None  # of a round, divided by its count; missing in older results


class FanOutReport(Record, frozen=True, kw_only=True):
    """`python -m bench fan-out`."""

    schema: Literal["coppice.bench.fan-out/1"] = "coppice.bench.fan-out/1"
    host: HostFacts
    image: str
    guest_kernel: str = ""  # its key; missing in older results
    workload_bytes: int
    summary: tuple[FanOutSummary, ...]
    skipped: tuple[Skipped, ...]
    rounds: tuple[Round, ...]


class Capture(Record, frozen=True, kw_only=True):
    """One standby."""

    source: Literal["boot", "fork"]  # RAM is the machine's own file, or a private mapping of the template's
    memory_bytes: int
    dirtied_bytes: int  # by the workload; the guest dirties some more pages by itself
    number: int
    pause_ms: float
    total_ms: float
    ram_written_bytes: int
    dirty_bytes: int  # private pages that the capture found
    host_cpu_ms: float
    host_written_bytes: int
    stages: dict[str, float] = {}


class CaptureSummary(Record, frozen=True, kw_only=True):
    """All captures of one case."""

    source: Literal["boot", "fork"]
    memory_bytes: int
    dirtied_bytes: int
    pause_ms: Percentiles
    total_ms: Percentiles
    ram_written_bytes: Percentiles
    dirty_bytes: Percentiles


class CaptureBenchReport(Record, frozen=True, kw_only=True):
    """`python -m bench capture`."""

    schema: Literal["coppice.bench.capture/1"] = "coppice.bench.capture/1"
    host: HostFacts
    image: str
    guest_kernel: str = ""  # its key; missing in older results
    summary: tuple[CaptureSummary, ...]
    captures: tuple[Capture, ...]


class Level(Record, frozen=True, kw_only=True):
    """One generation of a tree: a fork of the generation above, captured after it has dirtied memory."""

    number: int
    fork_ms: float  # until the fork was Running
    answered_ms: float  # until a command in it had answered
    pause_ms: float
    capture_ms: float
    dirty_bytes: int  # private pages that the capture found
    written_bytes: int  # of memory, by the capture
    file_bytes: int  # allocated by the new file of the memory
    extents: int  # of the map of its layers
    layers: int
    fork_samples_ms: tuple[float, ...] = ()  # of each round; the figures above are medians
    capture_samples_ms: tuple[float, ...] = ()


class Tree(Record, frozen=True, kw_only=True):
    """A tree of one machine per level, by one method."""

    method: str
    memory_bytes: int
    base_bytes: int  # allocated by the template's mem-file
    disk_bytes: int  # allocated by all files of memory, the base included
    cached_bytes: int  # of these files, in the page cache
    levels: tuple[Level, ...]


class TreeReport(Record, frozen=True, kw_only=True):
    """`python -m bench tree`."""

    schema: Literal["coppice.bench.tree/1"] = "coppice.bench.tree/1"
    host: HostFacts
    image: str
    guest_kernel: str = ""
    dirtied_bytes: int  # by the workload, at each level; the guest dirties some more pages by itself
    trees: tuple[Tree, ...]


def parser_of(description: str | None, samples: int) -> argparse.ArgumentParser:
    """Return a parser of the options that several benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--image", default="debian")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--output", type=Path, required=True)
    return parser


def write_report(report: Record, path: Path) -> None:
    """Write a report as indented JSON, completely or not at all.

    :raises CoppiceError: it cannot be written
    """
    temporary = temporary_beside(path)
    with os_errors(f"write {path}"):
        try:
            temporary.write_bytes(msgspec.json.format(to_json(report), indent=1) + b"\n")
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
