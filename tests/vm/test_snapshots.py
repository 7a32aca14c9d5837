"""Snapshots of real machines keep a moment, outlive their source, and can be restored."""

from __future__ import annotations

import asyncio

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance, SnapshotKind, State
from coppice.requests import (
    ReadFileRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    WriteFileRequest,
)
from machines import ask, copy_ms, mem_file

KNOWS = "os.__dict__.get('lesson')"


async def learn(host: AsyncHost, vm: Instance, lesson: str) -> None:
    """Store the lesson in a process's memory and on the disk."""
    await ask(host, vm, f"os.__dict__.update(lesson={lesson!r})")
    await host.call(WriteFileRequest(instance=vm.id, path="/root/lesson", data=lesson.encode()))


async def knows(host: AsyncHost, vm: Instance) -> tuple[str, bytes]:
    """Return the lesson in memory and the lesson on the disk."""
    return await ask(host, vm, KNOWS), await host.call(ReadFileRequest(instance=vm.id, path="/root/lesson"))


@pytest.mark.quiet
async def test_a_snapshot_of_a_running_machine_is_forked_and_restored(host: AsyncHost, vm: Instance) -> None:
    """The pause is shorter than a copy of the memory, and forks and the restored machine have memory
    and disk of that moment.
    """
    await learn(host, vm, "first")
    kept = await host.call(SnapshotRequest(instance=vm.id))
    disk = await host.call(SnapshotRequest(instance=vm.id, kind=SnapshotKind.STOPPED))
    forks: list[Instance] = []
    try:
        for each in (kept, disk):
            assert each.pause_ms <= await copy_ms(mem_file(host, vm)), each.pause_ms
        await learn(host, vm, "second")
        forks += (await host.call(SnapshotForkRequest(snapshot=kept.id, count=2, atomic=True))).instances
        for fork in forks:
            assert await knows(host, fork) == ("'first'", b"first")
        assert await knows(host, vm) == ("'second'", b"second")
        assert (await host.call(SnapshotRestoreRequest(snapshot=kept.id))).state is State.STANDBY
        assert (await host.call(RestoreRequest(instance=vm.id))).state is State.RUNNING
        assert await knows(host, vm) == ("'first'", b"first")
        report = await host.verify()
        assert report.differences == ()
        assert vm.name in report.skipped
        kept = (await host.snapshots.inspect(kept)).snapshot
        assert kept.mem_file is not None
        assert None not in (
            kept.mem_file.sha256,
            kept.disk_sha256,
        )  # recorded by this verification, or earlier in the background
        await host.snapshots.rm(kept)
        assert await knows(host, forks[0]) == ("'first'", b"first")
        (booted,) = (await host.call(SnapshotForkRequest(snapshot=disk.id, atomic=True))).instances
        forks.append(booted)
        assert await host.call(ReadFileRequest(instance=booted.id, path="/root/lesson")) == b"first"
    finally:
        await asyncio.gather(*(host.call(RmRequest(instance=fork.id)) for fork in forks))
        for left in await host.snapshots.ls(source=vm.id):
            await host.snapshots.rm(left)
    assert list(host.local.rooms.layout.snapshots.iterdir()) == []
