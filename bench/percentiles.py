"""Compute percentiles and summaries of samples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from bench.records import Capture, CaptureSummary, FanOutSummary, MachineSample, Percentiles, Round

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def nearest_rank(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of all values do not exceed (no
    interpolation).

    :raises ValueError: there are no values, or `percent` is not in (0, 100]
    """
    if not values or not 0 < percent <= 100:
        raise ValueError(f"a percentile needs values, and a percentage above 0 up to 100, not {percent}")
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def percentiles(values: Iterable[float]) -> Percentiles:
    """Return p50, p90 and p99 of at least one value."""
    found = list(values)
    return Percentiles(
        samples=len(found), p50=nearest_rank(found, 50), p90=nearest_rank(found, 90), p99=nearest_rank(found, 99)
    )


def summarize_fan_out(rounds: Sequence[Round]) -> tuple[FanOutSummary, ...]:
    """Return a summary per method, count, memory size and cache state, in order of appearance."""

    def case(members: list[Round]) -> FanOutSummary:
        first = members[0]
        machines: list[MachineSample] = [machine for member in members for machine in member.machines]
        available = [member.available_bytes / member.count for member in members if member.available_bytes is not None]
        return FanOutSummary(
            method=first.method,
            count=first.count,
            memory_bytes=first.memory_bytes,
            cache=first.cache,
            rounds=len(members),
            answered_ms=percentiles(machine.answered_ms for machine in machines),
            own_ms=percentiles(machine.own_ms for machine in machines),
            wall_ms=percentiles(member.wall_ms for member in members),
            vmm_cpu_ms=percentiles(machine.vmm_cpu_ms for machine in machines),
            host_cpu_ms=percentiles(member.host_cpu_ms / member.count for member in members),
            unique_ready_bytes=percentiles(machine.unique_ready_bytes for machine in machines),
            unique_worked_bytes=percentiles(machine.unique_worked_bytes for machine in machines),
            disk_written_bytes=percentiles(machine.disk_written_bytes for machine in machines),
            available_bytes=percentiles(available) if available else None,
        )

    keys = [(member.memory_bytes, member.count, member.cache, member.method) for member in rounds]
    return tuple(case(members) for members in _group(keys, rounds))


def summarize_captures(captures: Sequence[Capture]) -> tuple[CaptureSummary, ...]:
    """Return a summary per source, memory size and dirtied amount, in order of appearance."""

    def case(members: list[Capture]) -> CaptureSummary:
        first = members[0]
        return CaptureSummary(
            source=first.source,
            memory_bytes=first.memory_bytes,
            dirtied_bytes=first.dirtied_bytes,
            pause_ms=percentiles(member.pause_ms for member in members),
            total_ms=percentiles(member.total_ms for member in members),
            ram_written_bytes=percentiles(member.ram_written_bytes for member in members),
            dirty_bytes=percentiles(member.dirty_bytes for member in members),
        )

    keys = [(member.memory_bytes, member.source, member.dirtied_bytes) for member in captures]
    return tuple(case(members) for members in _group(keys, captures))


def _group(keys: Iterable[K], values: Iterable[T]) -> list[list[T]]:
    groups: dict[K, list[T]] = {}
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(key, []).append(value)
    return list(groups.values())
