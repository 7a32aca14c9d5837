"""The numbers in the documents are the committed results, and those are whole."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from coppice.bench.percentiles import summarize_captures, summarize_fan_out
from coppice.bench.records import CaptureBenchReport, FanOutReport, Method
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
    assert {row.method for row in fan_out.summary} >= set(Method) - {Method.AHEAD}
    assert {done.ram_written_bytes for done in capture.captures if done.source == "boot"} == {0}
