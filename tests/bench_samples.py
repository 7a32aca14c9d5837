"""Made-up benchmark results, for tests that process results."""

from __future__ import annotations

from bench.percentiles import summarize_captures, summarize_fan_out
from bench.records import (
    Cache,
    Capture,
    CaptureBenchReport,
    FanOutReport,
    HostFacts,
    MachineSample,
    Method,
    Round,
)
from coppice.model import GIB, MIB

HOST = HostFacts(
    date="2025-01-01T00:00:00Z",
    coppice_version="0.1.0",
    cpu_model="Example CPU",
    cpu_threads=2,
    ram_bytes=8 * GIB,
    kernel="6.1.0",
    filesystem="ext4",
    driver="qemu",
    vmm_version="7.2.0 (Debian)",
    accel="tcg",
    load_average=(0.1, 0.2, 0.3),
    python="3.11.2",
)
_SPEED = {Method.COLD: 3000.0, Method.COPY: 900.0, Method.SPARSE: 600.0, Method.SHARED: 300.0, Method.AHEAD: 240.0}


def machine(answered_ms: float, unique_bytes: int = MIB) -> MachineSample:
    """Return a machine that answered after this time."""
    return MachineSample(
        answered_ms=answered_ms,
        own_ms=answered_ms / 2,
        vmm_cpu_ms=100,
        vmm_written_bytes=0,
        unique_ready_bytes=unique_bytes,
        unique_worked_bytes=unique_bytes + 16 * MIB,
        overhead_bytes=20 * MIB,
        disk_written_bytes=4096,
    )


def one_round(method: Method, count: int, number: int, *, memory_bytes: int = GIB, cache: Cache = Cache.WARM) -> Round:
    """Return a round whose machines answer one after the other."""
    machines = tuple(machine(_SPEED[method] + 10 * index + number) for index in range(count))
    return Round(
        method=method,
        count=count,
        memory_bytes=memory_bytes,
        cache=cache,
        number=number,
        wall_ms=max(sample.answered_ms for sample in machines),
        host_cpu_ms=40.0 * count,
        host_written_bytes=0,
        cached_before=1.0,
        machines=machines,
    )


def fan_out_report() -> FanOutReport:
    """Return a report with two sizes, two counts, and all methods."""
    rounds = tuple(
        one_round(method, count, number, memory_bytes=size, cache=cache)
        for size in (256 * MIB, GIB)
        for count in (1, 4)
        for method in Method
        for cache in (Cache if method not in (Method.COLD, Method.AHEAD) else (Cache.WARM,))
        for number in range(2)
    )
    return FanOutReport(
        host=HOST, image="debian", workload_bytes=16 * MIB, summary=summarize_fan_out(rounds), skipped=(), rounds=rounds
    )


def capture_report() -> CaptureBenchReport:
    """Return a report with one size and both kinds of source."""
    captures = tuple(
        Capture(
            source="boot" if dirtied is None else "fork",
            memory_bytes=GIB,
            dirtied_bytes=dirtied or 0,
            number=number,
            pause_ms=10.0 + number,
            total_ms=100.0 + number,
            ram_written_bytes=dirtied or 0,
            dirty_bytes=dirtied or 0,
            host_cpu_ms=20,
            host_written_bytes=0,
        )
        for number in range(3)
        for dirtied in (None, 0, 16 * MIB)
    )
    return CaptureBenchReport(host=HOST, image="debian", summary=summarize_captures(captures), captures=captures)
