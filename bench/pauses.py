"""The pause of a snapshot of a running fork: pages copied before the pause, compared with all of them in it.

    python -m bench.pauses --home DIR --image IMAGE --output benchmarks/pauses.json

Two forks of one template run, and both dirty the same amount of memory. Snapshots are made in turns:
of one fork as it is; of the other one by a driver that hides that its VMM's writes can be observed, so
that all private pages are copied in the pause, as on kernels before 6.7. First both guests are idle,
then in each a process writes to 8 MiB all the time. The same two ways are measured for a standby.
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
from bench.records import HostFacts, write_report
from bench.trial import Guest, dirty, make_template, tagged
from coppice.client import AsyncHost, AsyncMachine
from coppice.model import MIB, CaptureReport, Record
from coppice.requests import RestoreRequest, SnapshotRequest, SnapshotRmRequest, StandbyRequest
from coppice.vmm.driver import Capabilities
from coppice.vmm.qemu.driver import QemuDriver

_WRITER = "dd if=/dev/zero of=/dev/shm/busy bs=1M count=8 conv=notrunc 2>/dev/null"


class InPause(QemuDriver):
    """QEMU, as if its writes could not be observed."""

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(super().capabilities, observable=False)


class Way(Record, frozen=True, kw_only=True):
    """One way to copy the pages."""

    pause_median_ms: float
    pause_least_ms: float
    memory_median_ms: float  # of the pause, for the pages
    total_median_ms: float
    dirty_median_bytes: int


class Case(Record, frozen=True, kw_only=True):
    """One guest and one operation."""

    name: str
    ahead: Way
    in_pause: Way


class PausesReport(Record, frozen=True, kw_only=True):
    """One run."""

    host: HostFacts
    samples: int
    dirtied_bytes: int
    cases: tuple[Case, ...]
