"""What the fan-out benchmark measures, in which order, and what it leaves out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from coppice.bench.fanout import Case, FanOutPlan, cases, skipped, unique_bytes
from coppice.bench.records import Cache, Method
from coppice.cli import main
from coppice.host.spares import MOST
from coppice.model import GIB, MIB, MemoryReport, Sharing

PLAN = FanOutPlan(image="debian", counts=(1, 4, 16), memory_bytes=(GIB,), samples=8, min_rounds=2)


def test_every_case_gets_its_samples() -> None:
    """Each method has the same number of machines in each case, at least as many as asked for, and never fewer rounds than the least."""
    rounds = Counter((case.method, case.count, case.cache) for _, case in cases(PLAN, GIB))
    for method in Method:
        for cache in Cache:
            is_run = cache is Cache.WARM or method not in (Method.COLD, Method.AHEAD)
            expected = {1: 8, 4: 2, 16: 2} if is_run else {1: 0, 4: 0, 16: 0}
            assert {count: rounds[method, count, cache] for count in PLAN.counts} == expected


def test_methods_are_interleaved_and_take_turns_to_be_first() -> None:
    """No method always runs on the warmer or the quieter host: all are in each round, and each round begins with another."""
    by_round: dict[int, list[tuple[Method, Cache]]] = {}
    for number, case in cases(PLAN, GIB):
        if case.count == 1:
            by_round.setdefault(number, []).append((case.method, case.cache))
    assert len({frozenset(kinds) for kinds in by_round.values()}) == 1
    assert len({kinds[0] for kinds in by_round.values()}) == 8


def test_full_copies_over_the_limit_are_left_out_and_said_so() -> None:
    """Copies that would fill the disk are skipped with the reason in the report; no other method ever is."""
    plan = FanOutPlan(image="debian", copy_limit_bytes=4 * GIB)

    def case(method: Method, count: int) -> Case:
        return Case(method=method, count=count, memory_bytes=GIB, cache=Cache.WARM)

    assert skipped(plan, case(Method.COPY, 4)) is None
    omitted = skipped(plan, case(Method.COPY, 5))
    assert omitted is not None
    assert "5120 MiB" in omitted.reason
    assert all(skipped(plan, case(method, 5)) is None for method in Method if method is not Method.COPY)


def test_more_than_a_host_starts_ahead_is_left_out_and_said_so() -> None:
    """A plan with many machines at once runs to its end without that case, where it would be refused."""
    assert skipped(PLAN, Case(method=Method.AHEAD, count=MOST, memory_bytes=GIB, cache=Cache.WARM)) is None
    omitted = skipped(PLAN, Case(method=Method.AHEAD, count=MOST + 1, memory_bytes=GIB, cache=Cache.WARM))
    assert omitted is not None
    assert str(MOST) in omitted.reason


def test_what_reads_no_cold_file_has_no_cold_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A plan of such methods alone has no case, and the command says so before it boots anything."""
    plan = FanOutPlan(image="debian", methods=(Method.COLD, Method.AHEAD), caches=(Cache.COLD,))
    assert list(cases(plan, GIB)) == []
    assert main(["--home", str(tmp_path), "bench", "fan-out", "--method", "cold-boot", "--cache", "cold"]) == 2
    assert "add --cache warm" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_copy_counts_as_its_own_memory() -> None:
    """Pages of a private copy are nobody else's: they are unique, though they are clean pages of a file."""
    report = MemoryReport(
        mapped_bytes=GIB, shared_bytes=90 * MIB, unique_bytes=MIB, vmm_overhead_bytes=0, inode=1, link_count=2, sharing=Sharing.HARDLINK
    )  # fmt: skip
    copied = MemoryReport(
        mapped_bytes=GIB, shared_bytes=90 * MIB, unique_bytes=MIB, vmm_overhead_bytes=0, inode=2, link_count=1, sharing=Sharing.COPY
    )  # fmt: skip
    assert (unique_bytes(report), unique_bytes(copied)) == (MIB, 91 * MIB)
