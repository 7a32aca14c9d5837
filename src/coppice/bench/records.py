"""Schemas of benchmark results: the facts of the host, every raw sample, and the summary that follows from the samples.

`schema` names the version of a document. A change of meaning is a new version.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from coppice.model import Record


class Method(StrEnum):
    """How a running machine comes to be."""

    COLD = "cold-boot"  # boot the image
    COPY = "full-copy"  # fork, with a private copy of the whole mem-file, as `cp` makes it
    SPARSE = "sparse-copy"  # the same, but blocks of zeros are skipped, as `cp --sparse=always` does
    SHARED = "shared-fork"  # fork as Coppice does it: a hard link
    AHEAD = "started-ahead"  # the same, with a VMM that had been started before the fork was asked for


class Cache(StrEnum):
    """Whether the template's mem-file and vmstate were in the page cache when the forks began."""

    WARM = "warm"
    COLD = "cold"


class HostFacts(Record, frozen=True, kw_only=True):
    """What the numbers depend on."""

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
    """One machine that came to be, in a round of `count`."""

    answered_ms: float  # from the request for the whole round until a command inside of this machine has answered
    own_ms: float  # from its own turn until it was Running: without waiting for a slot, and without the command
    vmm_cpu_ms: float  # user and system time of its VMM until the command answered; the kernel counts in ticks of 10 ms
    vmm_written_bytes: int  # by the VMM process, as /proc/PID/io has it; pages dirtied in a mapped file count
    unique_ready_bytes: int  # guest RAM that only this machine has, when the command had answered
    unique_worked_bytes: int  # the same after the workload
    overhead_bytes: int  # private memory of the VMM outside of guest RAM, after the workload
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
    wall_ms: float  # from the request until a command in each machine has answered
    host_cpu_ms: float  # user and system time of the process that asked, and of the helpers that it ran, without VMMs
    host_written_bytes: int  # by that process, as /proc/self/io has it
    cached_before: float | None  # part of the mem-file's data that the page cache had before; None for a boot
    machines: tuple[MachineSample, ...]


class Skipped(Record, frozen=True, kw_only=True):
    """A case that was not run, and why."""

    method: Method
    count: int
    memory_bytes: int
    reason: str


class Percentiles(Record, frozen=True, kw_only=True):
    """Nearest-rank percentiles: each is a value that was measured. With fewer than 100 samples p99 is the largest."""

    samples: int
    p50: float
    p90: float
    p99: float


class FanOutSummary(Record, frozen=True, kw_only=True):
    """All rounds of one case. Per machine where not said otherwise."""

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


class FanOutReport(Record, frozen=True, kw_only=True):
    """`coppice bench fan-out`."""

    schema: Literal["coppice.bench.fan-out/1"] = "coppice.bench.fan-out/1"
    host: HostFacts
    image: str
    workload_bytes: int
    summary: tuple[FanOutSummary, ...]
    skipped: tuple[Skipped, ...]
    rounds: tuple[Round, ...]


class Capture(Record, frozen=True, kw_only=True):
    """One standby."""

    source: Literal["boot", "fork"]  # RAM is the machine's own file, or a private mapping of its template's
    memory_bytes: int
    dirtied_bytes: int  # asked of the guest beforehand; it dirties some pages of its own too
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
    """`coppice bench capture`."""

    schema: Literal["coppice.bench.capture/1"] = "coppice.bench.capture/1"
    host: HostFacts
    image: str
    summary: tuple[CaptureSummary, ...]
    captures: tuple[Capture, ...]
