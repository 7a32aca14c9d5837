"""The benchmarks measure what they say, on real machines, and leave nothing behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from coppice.bench.records import Cache, CaptureBenchReport, FanOutReport, Method
from coppice.host import AsyncHost
from coppice.model import MIB
from documentation import environment, run


@pytest.mark.timeout(300)
async def test_a_quick_fan_out(host: AsyncHost, image: str, tmp_path: Path) -> None:
    """All methods in one run, each with a warm cache and a cold one. Copies are real: they write the whole file, or its data.

    A shared fork writes nearly nothing and owns little.
    """
    before = {instance.id for instance in await host.ls()}
    words = (
        "-m",
        "coppice",
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
    """A machine that was just booted is captured without a byte of RAM written; a fork with what it dirtied, and no more than some of its own."""
    words = ("-m", "coppice", "--json", "bench", "capture", "--quick", "--image", image)
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
