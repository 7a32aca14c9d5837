"""The numbers in the documents are the committed results, and those are whole."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from coppice.bench.percentiles import summarize_captures, summarize_fan_out
from coppice.bench.records import Cache, CaptureBenchReport, FanOutReport, Method
from coppice.model import MIB
from documentation import ROOT


def test_the_tables_are_made_from_the_committed_results() -> None:
    """Nobody has edited a number by hand, and nobody has committed results without their tables."""
    command = [sys.executable, str(ROOT / "tools" / "insert_results.py"), "--check"]
    checked = subprocess.run(
        command, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    assert checked.returncode == 0, checked.stderr.decode()


def test_the_committed_summaries_follow_from_the_committed_samples() -> None:
    """Every percentile can be computed again from the raw samples beside it, and all methods are from one run."""
    fan_out = msgspec.json.decode((ROOT / "benchmarks/fan-out.json").read_bytes(), type=FanOutReport)
    capture = msgspec.json.decode((ROOT / "benchmarks/capture.json").read_bytes(), type=CaptureBenchReport)
    assert fan_out.summary == summarize_fan_out(fan_out.rounds)
    assert capture.summary == summarize_captures(capture.captures)
    assert {row.method for row in fan_out.summary} == set(Method)
    assert {done.ram_written_bytes for done in capture.captures if done.source == "boot"} == {0}


def test_the_committed_run_shows_what_is_claimed() -> None:
    """One at a time a fork of a host that forks again answers 15 times sooner than a boot, within 300 ms; what it costs does not grow with the guest's RAM."""
    report = msgspec.json.decode((ROOT / "benchmarks/fan-out.json").read_bytes(), type=FanOutReport)
    alone = {
        (row.memory_bytes, row.method): row for row in report.summary if row.count == 1 and row.cache is Cache.WARM
    }
    sizes = sorted({size for size, _ in alone})
    assert sizes[-1] >= 16 * sizes[0]
    for size in sizes:
        boot, shared, ahead = (alone[size, method] for method in (Method.COLD, Method.SHARED, Method.AHEAD))
        assert boot.answered_ms.p50 >= 15 * ahead.answered_ms.p50
        assert max(shared.answered_ms.p50, ahead.answered_ms.p50) <= 300
        for fork in (shared, ahead):
            assert fork.unique_ready_bytes.p99 <= 2 * MIB
            assert fork.disk_written_bytes.p99 <= MIB
    for method in (Method.SHARED, Method.AHEAD):
        assert alone[sizes[-1], method].answered_ms.p50 <= 1.2 * alone[sizes[0], method].answered_ms.p50
