"""Snapshots of real machines: a moment is kept while the machine runs on, outlives it, and can be gone back to; verify finds all of it sound."""

from __future__ import annotations

import asyncio

import pytest

from coppice.host import AsyncHost
from coppice.model import Instance, SnapshotKind, State
from machines import ask

PAUSE_LIMIT_MS = 150
KNOWS = "os.__dict__.get('lesson')"


async def learn(host: AsyncHost, vm: Instance, lesson: str) -> None:
    """Have it in a process's memory, and on the disk."""
    await ask(host, vm, f"os.__dict__.update(lesson={lesson!r})")
    await host.write_file(vm, "/root/lesson", lesson.encode())


async def knows(host: AsyncHost, vm: Instance) -> tuple[str, bytes]:
    """What is in memory and on the disk."""
    return await ask(host, vm, KNOWS), await host.read_file(vm, "/root/lesson")


@pytest.mark.quiet
async def test_a_running_machine_is_kept_goes_on_and_goes_back(host: AsyncHost, vm: Instance) -> None:
    """The pause is short; forks of the snapshot and the machine itself, taken back, are at that moment, in memory and on disk; then the source goes."""
    await learn(host, vm, "first")
    kept = await host.snapshot_create(vm)
    disk = await host.snapshot_create(vm, kind=SnapshotKind.STOPPED)
    forks: list[Instance] = []
    try:
        for each in (kept, disk):
            assert each.pause_ms <= PAUSE_LIMIT_MS, each.pause_ms
        await learn(host, vm, "second")
        forks += (await host.snapshot_fork(kept, count=2, atomic=True)).instances
        for fork in forks:
            assert await knows(host, fork) == ("'first'", b"first")
        assert await knows(host, vm) == ("'second'", b"second")
        assert (await host.snapshot_restore(kept)).state is State.STANDBY
        assert (await host.restore(vm)).state is State.RUNNING
        assert await knows(host, vm) == ("'first'", b"first")
        report = await host.verify()
        assert report.differences == ()
        assert vm.name in report.skipped
        kept = (await host.snapshot_inspect(kept)).snapshot
        assert kept.mem_file is not None
        assert None not in (
            kept.mem_file.sha256,
            kept.disk_sha256,
        )  # recorded by this verification, or before it in the background
        await host.snapshot_rm(kept)
        assert await knows(host, forks[0]) == ("'first'", b"first")
        (booted,) = (await host.snapshot_fork(disk, atomic=True)).instances
        forks.append(booted)
        assert await host.read_file(booted, "/root/lesson") == b"first"
    finally:
        await asyncio.gather(*(host.rm(fork) for fork in forks))
        for left in await host.snapshot_ls(source=vm):
            await host.snapshot_rm(left)
    assert list(host.rooms.layout.snapshots.iterdir()) == []
