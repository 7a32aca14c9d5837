"""The benchmarks measure what they claim on real machines, and leave nothing behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from bench.records import Cache, CaptureBenchReport, FanOutReport, Method, TreeReport
from coppice.client import AsyncHost
from coppice.model import MIB
from documentation import environment, run


@pytest.mark.timeout(300)
async def test_a_quick_fan_out(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """One run has all methods, each with a warm cache and a cold one.

    Copies are real: they write the whole file, or its data. A shared fork writes nearly nothing and
    has little memory of its own.
    """
    before = {instance.id for instance in await host.ls()}
    words = (
        "-m",
        "bench",
        "fan-out",
        "--quick",
        "--image",
        image,
        "-o",
        "result.json",
        "--plot",
        "plot.png",
    )
    printed = await run(
        sys.executable, *words, env=environment(host.home, tmp_path), directory=tmp_path, deadline_s=280
    )
    assert "shared-fork" in printed
    report = msgspec.json.decode(await asyncio.to_thread((tmp_path / "result.json").read_bytes), type=FanOutReport)
    assert report.skipped == ()
    for done in report.rounds:
        assert len(done.machines) == done.count == 2
        for machine in done.machines:
            assert 0 < machine.own_ms < done.wall_ms
            assert machine.answered_ms <= done.wall_ms
            assert machine.vmm_cpu_ms > 0
            assert machine.unique_worked_bytes >= machine.unique_ready_bytes
            if done.method in (Method.SHARED, Method.AHEAD):
                assert machine.unique_ready_bytes < 4 * MIB
                assert machine.disk_written_bytes < 2 * MIB
            if done.method in (Method.COPY, Method.SPARSE):
                assert machine.unique_ready_bytes > 8 * MIB
                assert machine.disk_written_bytes > 32 * MIB
        if done.method is Method.COPY:
            assert done.host_written_bytes >= 2 * 256 * MIB
    assert {(done.method, done.cache) for done in report.rounds} == {(row.method, row.cache) for row in report.summary}
    forks = [done for done in report.rounds if done.method is Method.SHARED]
    assert {done.cache for done in forks} == {Cache.WARM, Cache.COLD}
    assert all((done.cached_before or 0) > 0.9 for done in forks if done.cache is Cache.WARM)
    assert all((done.cached_before or 0) < 0.1 for done in forks if done.cache is Cache.COLD)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {instance.id for instance in await host.ls()} == before


@pytest.mark.timeout(300)
async def test_a_quick_capture(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """The capture of a freshly booted machine writes no RAM.

    The capture of a fork writes its dirty pages and little more.
    """
    words = ("-m", "bench", "capture", "--quick", "--json", "--image", image)
    printed = await run(
        sys.executable, *words, env=environment(host.home, tmp_path), directory=tmp_path, deadline_s=280
    )
    report = msgspec.json.decode(printed, type=CaptureBenchReport)
    assert [(done.source, done.dirtied_bytes) for done in report.captures] == [("boot", 0), ("fork", 0), ("fork", MIB)]
    booted, idle, dirtied = report.captures
    assert booted.ram_written_bytes == 0
    assert dirtied.dirty_bytes >= MIB
    assert dirtied.dirty_bytes > idle.dirty_bytes
    for done in report.captures:
        assert 0 < done.pause_ms <= done.total_ms


@pytest.mark.timeout(300)
async def test_a_quick_tree(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """With layers each level writes what it dirtied and the tree has one base; with whole files each level has its own."""
    words = ("-m", "bench", "tree", "--quick", "--json", "--image", image)
    printed = await run(
        sys.executable, *words, env=environment(host.home, tmp_path), directory=tmp_path, deadline_s=280
    )
    layered, whole = msgspec.json.decode(printed, type=TreeReport).trees
    assert [level.layers for level in layered.levels] == [1, 2]
    assert [level.layers for level in whole.levels] == [0, 0]
    assert all(MIB <= level.dirty_bytes <= level.written_bytes <= 1.2 * level.dirty_bytes for level in layered.levels)
    own = sum(level.file_bytes for level in layered.levels)
    assert layered.disk_bytes == layered.base_bytes + own
    assert layered.cached_bytes <= 1.2 * layered.disk_bytes
    assert whole.disk_bytes > 2 * layered.disk_bytes
