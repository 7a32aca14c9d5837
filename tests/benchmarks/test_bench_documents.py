"""The numbers in the documents come from the committed results, which are complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from bench.percentiles import summarize_captures, summarize_fan_out
from bench.records import Cache, CaptureBenchReport, FanOutReport, Method, TreeReport
from coppice.model import MIB
from documentation import ROOT


def test_the_tables_are_made_from_the_committed_results() -> None:
    """No number was edited by hand, and no results were committed without their tables."""
    command = [sys.executable, "-m", "bench.insert_results", "--check"]
    source = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    checked = subprocess.run(command, capture_output=True, check=False, cwd=ROOT, env=source, timeout=60)
    assert checked.returncode == 0, checked.stderr.decode()


def test_the_committed_summaries_follow_from_the_committed_samples() -> None:
    """Every percentile can be computed from the raw samples in the same file, and all methods are
    from one run.
    """
    fan_out = msgspec.json.decode((ROOT / "benchmarks/fan-out.json").read_bytes(), type=FanOutReport)
    capture = msgspec.json.decode((ROOT / "benchmarks/capture.json").read_bytes(), type=CaptureBenchReport)
    assert fan_out.summary == summarize_fan_out(fan_out.rounds)
    assert capture.summary == summarize_captures(capture.captures)
    assert {row.method for row in fan_out.summary} == set(Method)
    assert {done.ram_written_bytes for done in capture.captures if done.source == "boot"} == {0}


def test_a_level_of_a_committed_tree_costs_what_it_dirtied() -> None:
    """It writes at most 1.2 times that, at each level of any guest; the whole tree has at most 1.2
    times the size of its files in the page cache.
    """
    report = msgspec.json.decode((ROOT / "benchmarks/tree.json").read_bytes(), type=TreeReport)
    trees = {(tree.memory_bytes, tree.method): tree for tree in report.trees}
    assert trees.keys() == {(size, method) for size in (512 * MIB, 4096 * MIB) for method in ("layers", "whole files")}
    for size in (512 * MIB, 4096 * MIB):
        layered, whole = trees[size, "layers"], trees[size, "whole files"]
        assert len(layered.levels) == len(whole.levels) == 6
        assert all(level.written_bytes <= 1.2 * level.dirty_bytes for level in layered.levels)
        assert layered.cached_bytes <= 1.2 * layered.disk_bytes
        assert layered.disk_bytes < whole.disk_bytes / 3


def test_the_committed_run_supports_the_claims() -> None:
    """A single fork of a host that has forked before answers 15 times sooner than a boot, within
    300 ms, at a cost that does not grow with the guest's RAM.
    """
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


def committed(name: str) -> Any:
    """Return a committed result as plain JSON: older ones may lack newer fields."""
    return json.loads((ROOT / "benchmarks" / name).read_bytes())


@pytest.mark.parametrize("name", ["disks.json", "volume-disks.json"])
def test_a_fork_of_a_full_disk_or_volume_writes_little(name: str) -> None:
    """With 1 GiB on it, a fork is placed within 5 ms and writes at most 2 MiB."""
    found = committed(name)
    assert found["data_bytes"] >= 1 << 30
    assert found["layer"]["place_median_ms"] < 5
    assert max(found["layer"]["bytes_written"], found["own_bytes"]) <= 2 * MIB
    assert found["copy"]["bytes_written"] >= 1 << 30


@pytest.mark.parametrize("name", ["live-disks.json", "volume-live-disks.json"])
def test_a_capture_of_a_running_machine_copies_no_disk(name: str) -> None:
    """With 256 MiB in its topmost file."""
    found = committed(name)
    assert found["data_bytes"] >= 256 * MIB
    assert found["layer"]["bytes_written"] <= 2 * MIB
    assert found["layer"]["pause_median_ms"] < found["copy"]["pause_median_ms"] / 4


def test_pages_are_copied_before_the_pause() -> None:
    """An idle guest with 64 MiB of dirty pages is paused for at most 25 ms."""
    found = committed("pauses.json")
    assert found["dirtied_bytes"] == 64 * MIB
    (idle,) = (case for case in found["cases"] if case["name"] == "idle guest")
    assert idle["ahead"]["dirty_median_bytes"] > 64 * MIB
    assert idle["ahead"]["pause_median_ms"] <= 25 < idle["in_pause"]["pause_median_ms"]


def test_the_cpu_time_of_the_host_hardly_depends_on_the_number_of_instances() -> None:
    """With 3,000 others a fork takes at most a fifth more, and 500 go to Standby in a second. Each operation takes less
    than before, in the same run.
    """
    found = committed("host-cpu-side-by-side.json")
    after = {name: each["after"] for name, each in found["host_ms"].items()}
    assert after["fork+exec+rm, 3000 others"] <= 1.2 * after["fork+exec+rm, 0 others"]
    assert after["fork, 3000 others"] <= 1.2 * after["fork, 0 others"]
    for name, each in found["forks_per_second"].items():
        assert each["after"] >= 500, name
    for name in ("fork", "exec", "rm", "fork+exec+rm"):
        for others in (0, 3000):
            share = found["host"][f"{name}, {others} others"]
            assert share["after"] < share["before"], name
    assert len(found["raw"]["before"]) == len(found["raw"]["after"]) == found["rounds"] >= 3


def test_a_level_of_a_committed_tree_takes_as_long_as_the_one_above() -> None:
    """The slowest level takes at most one and a half times as long as the quickest."""
    report = msgspec.json.decode((ROOT / "benchmarks/tree.json").read_bytes(), type=TreeReport)
    for tree in report.trees:
        if tree.method == "layers":
            assert all(len(level.capture_samples_ms) >= 3 for level in tree.levels)
            captures = [level.capture_ms for level in tree.levels]
            assert max(captures) <= 1.5 * min(captures)
            assert tree.levels[-1].fork_ms <= 1.5 * tree.levels[0].fork_ms
