"""The fan-out benchmark's cases, their order, and the omitted ones."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.capture import CapturePlan
from bench.fanout import Case, FanOutPlan, cases, skipped, unique_bytes
from bench.records import Cache, Method
from coppice.cli.context import Cli
from coppice.errors import UsageError
from coppice.model import GIB, MIB, MemoryReport, Sharing
from coppice.names import MAX_SPARES

PLAN = FanOutPlan(image="debian", counts=(1, 4, 16), memory_bytes=(GIB,), samples=8, min_rounds=2)


def test_every_case_gets_its_samples() -> None:
    """Each method has the same number of machines in each case, at least the requested number, and
    never fewer rounds than the minimum.
    """
    rounds = Counter((case.method, case.count, case.cache) for _, case in cases(PLAN, GIB))
    for method in Method:
        for cache in Cache:
            is_run = cache is Cache.WARM or method not in (Method.COLD, Method.AHEAD)
            expected = {1: 8, 4: 2, 16: 2} if is_run else {1: 0, 4: 0, 16: 0}
            assert {count: rounds[method, count, cache] for count in PLAN.counts} == expected


def test_methods_are_interleaved_and_alternate_in_order() -> None:
    """Every round has all methods and begins with a different one, so that no method always runs on
    a warmer or quieter host.
    """
    by_round: dict[int, list[tuple[Method, Cache]]] = {}
    for number, case in cases(PLAN, GIB):
        if case.count == 1:
            by_round.setdefault(number, []).append((case.method, case.cache))
    assert len({frozenset(kinds) for kinds in by_round.values()}) == 1
    assert len({kinds[0] for kinds in by_round.values()}) == 8


def test_full_copies_over_the_limit_are_skipped_with_a_reason() -> None:
    """Only copies that would fill the disk are skipped, and the report has the reason."""
    plan = FanOutPlan(image="debian", copy_limit_bytes=4 * GIB)

    def case(method: Method, count: int) -> Case:
        return Case(method=method, count=count, memory_bytes=GIB, cache=Cache.WARM)

    assert skipped(plan, case(Method.COPY, 4)) is None
    omitted = skipped(plan, case(Method.COPY, 5))
    assert omitted is not None
    assert "5120 MiB" in omitted.reason
    assert all(skipped(plan, case(method, 5)) is None for method in Method if method is not Method.COPY)


def test_more_machines_than_a_host_starts_ahead_are_skipped_with_a_reason() -> None:
    """A plan with many concurrent machines omits this case, which would be refused, and runs to its
    end.
    """
    assert skipped(PLAN, Case(method=Method.AHEAD, count=MAX_SPARES, memory_bytes=GIB, cache=Cache.WARM)) is None
    omitted = skipped(PLAN, Case(method=Method.AHEAD, count=MAX_SPARES + 1, memory_bytes=GIB, cache=Cache.WARM))
    assert omitted is not None
    assert str(MAX_SPARES) in omitted.reason


def test_a_method_that_reads_no_cold_file_has_no_cold_case(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A plan with only such methods has no case, and the command says so before it boots a machine."""
    plan = FanOutPlan(image="debian", methods=(Method.COLD, Method.AHEAD), caches=(Cache.COLD,))
    assert list(cases(plan, GIB)) == []
    assert main(["fan-out", "--home", str(tmp_path), "--method", "cold-boot", "--cache", "cold"]) == 2
    assert "add --cache warm" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_copy_counts_as_its_own_memory() -> None:
    """Pages of a private copy count as unique, although they are clean pages of a file."""
    report = MemoryReport(
        mapped_bytes=GIB, shared_bytes=90 * MIB, unique_bytes=MIB, vmm_overhead_bytes=0, inode=1, link_count=2, sharing=Sharing.HARDLINK
    )  # fmt: skip
    copied = MemoryReport(
        mapped_bytes=GIB, shared_bytes=90 * MIB, unique_bytes=MIB, vmm_overhead_bytes=0, inode=2, link_count=1, sharing=Sharing.COPY
    )  # fmt: skip
    assert (unique_bytes(report), unique_bytes(copied)) == (MIB, 91 * MIB)


@pytest.mark.parametrize("command", ["fan-out", "capture"])
def test_the_guest_kernel_and_the_accelerator_can_be_chosen(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both benchmarks accept --kernel and --accel, and measure with them."""
    chosen: list[object] = []

    def call(cli: Cli, work: Callable[[object], Coroutine[object, object, object]]) -> object:
        chosen.append(cli.accel)
        return asyncio.run(work(None))

    async def measure(host: object, plan: FanOutPlan | CapturePlan, say: object) -> None:
        del host, say
        chosen.append(plan.kernel)
        raise UsageError("nothing is measured in this test", hint="")

    monkeypatch.setattr(Cli, "call", call)
    monkeypatch.setattr("bench.cli.measure_fan_out", measure)
    monkeypatch.setattr("bench.cli.measure_capture", measure)
    assert main([command, "--home", str(tmp_path), "--kernel", "f00dfeed", "--accel", "tcg"]) == UsageError.exit_code
    assert chosen == ["tcg", "f00dfeed"]
