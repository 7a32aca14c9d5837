"""Snapshots whose process died: what was being made or removed goes, a restore in place is done or undone, and gc knows them."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.host import AsyncHost
from coppice.instance import rollback
from coppice.instance import snapshot as snapshots
from coppice.model import Instance, Snapshot, SnapshotKind, State
from coppice.names import new_id
from coppice.store.store import Store
from coppice.vmm import driver as files
from coppice.vmm.process import start_ticks
from fakes.hosting import ask, assert_tidy, boot, make

KEPT = "kept"


@pytest.fixture
def dead_store(fake_host: AsyncHost) -> Iterator[Store]:
    """The database as a process that is dead now had it open: what it begins was interrupted."""
    process = subprocess.Popen(["sleep", "100"])
    ticks = start_ticks(process.pid)
    process.kill()
    process.wait()
    assert ticks is not None
    store = Store(fake_host.rooms.layout.database, (process.pid, ticks))
    yield store
    store.close()


async def moved_on(host: AsyncHost, kind: SnapshotKind) -> tuple[Instance, Snapshot]:
    """A Running instance that knows `second`, with a snapshot of when it knew `first`."""
    await boot(host)
    await ask(host, "oak", "save", "first")
    await host.standby("oak")
    made = await host.snapshot_create("oak", name=KEPT, kind=kind)
    oak = await host.restore("oak")
    await ask(host, "oak", "save", "second")
    return oak, made


@pytest.mark.parametrize("came", ["record", "directory", "files"])
async def test_a_snapshot_that_was_being_made_is_removed(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, came: str
) -> None:
    """However far it came; until then nobody finds it, and then its name is free. Its source does not notice."""
    await make(fake_host, State.STANDBY)
    made = await fake_host.snapshot_create("oak", name="other")
    half = msgspec.structs.replace(made, id=new_id(), name=KEPT)
    dead_store.snapshots.create(half, snapshots.OPERATION)
    directory = fake_host.rooms.layout.snapshot(half.id)
    if came != "record":
        directory.mkdir()
    if came == "files":
        for name in (files.MEMORY, ".overlay.raw.0123456789ab.tmp"):
            (directory / name).write_bytes(b"half")
    assert [found.name for found in await fake_host.snapshot_ls()] == ["other"]
    assert (await fake_host.gc()).removed == ()
    assert not directory.exists()  # gc recovers first
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        await next_host.snapshot_create("oak", name=KEPT)


@pytest.mark.parametrize("came", ["begun", "renamed", "removed"])
async def test_a_removal_that_was_interrupted_is_finished(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, came: str
) -> None:
    """A snapshot that is half gone is never found."""
    await make(fake_host, State.STANDBY)
    made = await fake_host.snapshot_create("oak", name=KEPT)
    directory = fake_host.rooms.layout.snapshot(made.id)
    dead_store.snapshots.begin(made, snapshots.REMOVAL)
    if came != "begun":
        directory.rename(directory.with_name(f".{made.id}.removed"))
    if came == "removed":
        for path in (directory.with_name(f".{made.id}.removed")).iterdir():
            path.unlink()
    assert await fake_host.snapshot_ls() == []
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        await next_host.restore("oak")


async def test_a_restore_that_was_not_committed_is_undone(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """The machine runs on with what it knows; what was placed beside its files is gone."""
    oak, made = await moved_on(fake_host, SnapshotKind.STANDBY)
    dead_store.begin(oak, rollback.OPERATION)
    rollback._stage(fake_host.rooms, oak, made)
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
        assert found == oak
        assert "restore.new" not in {path.name for path in next_host.rooms.directory(oak.id).iterdir()}
        assert await ask(next_host, "oak", "load") == "second"


@pytest.mark.parametrize("kind", list(SnapshotKind))
@pytest.mark.parametrize("came", ["committed", "disk renamed", "all renamed"])
@pytest.mark.parametrize("finder", ["open", "restore"])
async def test_a_committed_restore_is_finished(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, kind: SnapshotKind, came: str, finder: str
) -> None:
    """At whatever step it stopped, memory and disk are those of the snapshot, never one of each."""
    oak, made = await moved_on(fake_host, kind)
    mem_file, stamp = rollback._stage(fake_host.rooms, oak, made)
    target = msgspec.structs.replace(oak, state=State(kind), mem_file=mem_file, disk_stamp=stamp, snapshot=made.id)
    dead_store.begin(target, rollback.COMMITTED)
    directory = fake_host.rooms.directory(oak.id)
    if came != "committed":
        assert oak.vmm is not None
        await fake_host.rooms.driver.quit(directory, oak.vmm)
        staged = [files.OVERLAY_DISK] if came == "disk renamed" else sorted(_names(directory / "restore.new"))
        for name in staged:
            (directory / "restore.new" / name).rename(directory / name)
    if finder == "open":
        async with make_host() as next_host:
            (found,) = await assert_tidy(next_host, "oak")
            assert found.state is State(kind)
    oak = await (fake_host.restore if kind is SnapshotKind.STANDBY else fake_host.start)("oak")
    assert await ask(fake_host, "oak", "load") == "first"
    await assert_tidy(fake_host, "oak")


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_gc_keeps_snapshots_and_collects_what_is_none(fake_host: AsyncHost) -> None:
    """A snapshot's directory and lock stay, though no instance has its id; directories without a record go, renamed ones too."""
    await make(fake_host, State.STANDBY)
    made = await fake_host.snapshot_create("oak", name=KEPT)
    layout = fake_host.rooms.layout
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
    assert (await fake_host.snapshot_inspect(KEPT)).snapshot == made
    assert (await fake_host.snapshot_fork(KEPT)).succeeded == 1


async def test_removing_what_others_use(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """Two hosts remove one snapshot at once: one does, the other is told that it is gone, and no lock file is left."""
    await make(fake_host, State.STANDBY)
    await fake_host.snapshot_create("oak", name=KEPT)
    async with make_host() as other:
        outcomes = await asyncio.gather(fake_host.snapshot_rm(KEPT), other.snapshot_rm(KEPT), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "NotFound"]
    await assert_tidy(fake_host, "oak")
