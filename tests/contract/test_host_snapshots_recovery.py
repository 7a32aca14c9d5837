"""Recovery of snapshots: an interrupted creation or removal is cleaned up, an interrupted restore
is finished or undone, and gc keeps snapshots.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.model import Instance, Snapshot, SnapshotKind, State
from coppice.names import new_id
from coppice.requests import (
    GetRequest,
    RestoreRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
)
from coppice.snapshots import rollback
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm import driver as files
from fakes.hosting import ask, assert_tidy, boot, make

KEPT = "kept"


async def moved_on(host: AsyncHost, kind: SnapshotKind) -> tuple[Instance, Snapshot]:
    """Return a Running instance that knows `second`, and its snapshot from when it knew `first`."""
    await boot(host)
    await ask(host, "oak", "save", "first")
    await host.call(StandbyRequest(instance="oak"))
    made = await host.call(SnapshotRequest(instance="oak", name=KEPT, kind=kind))
    oak = await host.call(RestoreRequest(instance="oak"))
    await ask(host, "oak", "save", "second")
    return oak, made


@pytest.mark.parametrize("came", ["record", "directory", "files"])
async def test_an_interrupted_snapshot_is_removed(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, came: str
) -> None:
    """A partial snapshot is never listed. Recovery removes it at any step, and frees its name."""
    await make(fake_host, State.STANDBY)
    made = await fake_host.call(SnapshotRequest(instance="oak", name="other"))
    half = msgspec.structs.replace(made, id=new_id(), name=KEPT)
    dead_store.snapshots.create(half, JournalOperation.SNAPSHOT)
    directory = fake_host.local.rooms.layout.snapshot(half.id)
    if came != "record":
        directory.mkdir()
    if came == "files":
        for name in (files.MEMORY, ".overlay.raw.0123456789ab.tmp"):
            (directory / name).write_bytes(b"half")
    assert [found.name for found in await fake_host.snapshots.ls()] == ["other"]
    assert (await fake_host.gc()).removed == ()
    assert not directory.exists()  # gc recovers first
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        await next_host.call(SnapshotRequest(instance="oak", name=KEPT))


@pytest.mark.parametrize("came", ["begun", "renamed", "removed"])
async def test_an_interrupted_removal_is_finished(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, came: str
) -> None:
    """A partially removed snapshot is never listed."""
    await make(fake_host, State.STANDBY)
    made = await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    directory = fake_host.local.rooms.layout.snapshot(made.id)
    dead_store.snapshots.begin(made, JournalOperation.SNAPSHOT_REMOVE)
    if came != "begun":
        directory.rename(directory.with_name(f".{made.id}.removed"))
    if came == "removed":
        for path in (directory.with_name(f".{made.id}.removed")).iterdir():
            path.unlink()
    assert await fake_host.snapshots.ls() == []
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        await next_host.call(RestoreRequest(instance="oak"))


async def test_an_uncommitted_restore_is_undone(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """The machine runs on with what it knows, and the staged files are removed."""
    oak, made = await moved_on(fake_host, SnapshotKind.STANDBY)
    dead_store.begin(oak, JournalOperation.SNAPSHOT_RESTORE)
    rollback._stage(fake_host.local.rooms, oak, made)
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
        assert found == oak
        assert "restore.new" not in {path.name for path in next_host.local.rooms.directory(oak.id).iterdir()}
        assert await ask(next_host, "oak", "load") == "second"


@pytest.mark.parametrize("kind", list(SnapshotKind))
@pytest.mark.parametrize("came", ["committed", "disk renamed", "all renamed"])
@pytest.mark.parametrize("finder", ["open", "restore"])
async def test_a_committed_restore_is_finished(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, kind: SnapshotKind, came: str, finder: str
) -> None:
    """Memory and disk both come from the snapshot, at whatever step the restore stopped."""
    oak, made = await moved_on(fake_host, kind)
    placed = rollback._stage(fake_host.local.rooms, oak, made)
    target = msgspec.structs.replace(
        oak, state=State(kind), capture=placed.capture, disk_layers=placed.disk_layers, snapshot=made.id
    )
    dead_store.begin(target, JournalOperation.SNAPSHOT_RESTORE_COMMIT)
    directory = fake_host.local.rooms.directory(oak.id)
    if came != "committed":
        assert oak.vmm is not None
        await fake_host.local.rooms.drivers.chosen.quit(directory, oak.vmm)
        staged = [files.OVERLAY_DISK] if came == "disk renamed" else sorted(_names(directory / "restore.new"))
        for name in staged:
            (directory / "restore.new" / name).rename(directory / name)
    if finder == "open":
        async with make_host() as next_host:
            (found,) = await assert_tidy(next_host, "oak")
            assert found.state is State(kind)
    standby = kind is SnapshotKind.STANDBY
    await fake_host.call(RestoreRequest(instance="oak") if standby else StartRequest(instance="oak"))
    oak = await fake_host.call(GetRequest(instance="oak"))
    assert await ask(fake_host, "oak", "load") == "first"
    await assert_tidy(fake_host, "oak")


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_gc_keeps_snapshots_and_removes_stray_directories(fake_host: AsyncHost) -> None:
    """A snapshot's directory and lock stay, although no instance has its id.

    Directories without a record are removed, renamed ones too.
    """
    await make(fake_host, State.STANDBY)
    made = await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    layout = fake_host.local.rooms.layout
    stray, half = layout.snapshot(new_id()), layout.snapshots / f".{new_id()}.removed"
    for path in (stray, half):
        path.mkdir()
        (path / files.MEMORY).write_bytes(b"x" * 8192)
    report = await fake_host.gc(dry_run=True)
    assert sorted(report.removed) == sorted(f"snapshots/{path.name}" for path in (stray, half))
    assert report.bytes_freed == 2 * 8192
    assert stray.exists()
    assert (await fake_host.gc()).removed == report.removed
    await assert_tidy(fake_host, "oak")
    assert (await fake_host.snapshots.inspect(KEPT)).snapshot == made
    assert (await fake_host.call(SnapshotForkRequest(snapshot=KEPT))).succeeded == 1


async def test_two_hosts_that_remove_one_snapshot(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """One host removes it and the other gets NotFound; no lock file is left."""
    await make(fake_host, State.STANDBY)
    await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    async with make_host() as other:
        outcomes = await asyncio.gather(fake_host.snapshots.rm(KEPT), other.snapshots.rm(KEPT), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "NotFound"]
    await assert_tidy(fake_host, "oak")
