"""Restore in place: return an instance to one of its snapshots.

The snapshot's files are first staged next to the instance's own. One commit to the journal decides
the outcome. Before it, the instance is unchanged and keeps running. After it, only ending its VMM
and renaming the new files over the old ones remain, and both can be repeated.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from coppice.completion import complete, in_thread
from coppice.linux.files import os_errors, sync
from coppice.machine import destroy, disks
from coppice.machine import directory as directories
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Snapshot, SnapshotKind, State
from coppice.snapshots import snapshot
from coppice.state.journal import JournalOperation

_STAGING = "restore.new"


async def roll_back(rooms: Rooms, instance: Instance, moment: Snapshot) -> Instance:
    """Give an instance the memory and disk of one of its snapshots. The caller holds both locks.

    Return the instance, Standby or Stopped like the snapshot's kind.

    :raises IntegrityError: the snapshot's mem-file has changed since the capture
    :raises NoSpace: the disk is full
    """
    try:
        await in_thread(rooms.store.begin, instance, JournalOperation.SNAPSHOT_RESTORE)
        placed = await in_thread(_stage, rooms, instance, moment)
        target = msgspec.structs.replace(
            instance,
            state=State(moment.kind),
            snapshot=moment.id,
            machine=moment.machine,
            process=moment.process,
            capture=placed.capture,
            disk_layers=placed.disk_layers,
            exit_reason=None,
            identified=moment.identified,
        )
        await in_thread(rooms.store.begin, target, JournalOperation.SNAPSHOT_RESTORE_COMMIT)
    except BaseException:
        # The cancellation came after the commit.
        if await in_thread(rooms.store.is_at, instance.id, JournalOperation.SNAPSHOT_RESTORE_COMMIT):
            await complete(finish(rooms, target))
        else:
            await complete(undo(rooms, instance))
        raise
    return await complete(finish(rooms, target))


def _stage(rooms: Rooms, instance: Instance, moment: Snapshot) -> directories.Placed:
    """Stage the snapshot's files like a fork's; return the instance's future capture and disk, which
    the renames do not change.
    """
    staging = rooms.directory(instance.id) / _STAGING
    origin, source = rooms.layout.snapshot(moment.id), snapshot.as_source(moment)
    with_memory = moment.kind is SnapshotKind.STANDBY
    if with_memory:
        directories.require_current(origin, source)
    directories.remove(staging)
    directories.create(staging)
    placed = directories.place_fork(
        origin,
        staging,
        source,
        with_memory=with_memory,
        starts=False,
        drivers=(rooms.driver(moment), rooms.driver(instance)),
        overlays=rooms.overlays,
    )
    directories.make_durable(
        staging, moment.machine
    )  # with the names: if a commit's new files were lost, the old ones would remain
    return placed


async def undo(rooms: Rooms, instance: Instance) -> None:
    """Remove the staged files and end the operation; the instance is unchanged. Idempotent."""
    await in_thread(directories.remove, rooms.directory(instance.id) / _STAGING)
    await in_thread(rooms.store.save, instance, done=True)


async def finish(rooms: Rooms, instance: Instance) -> Instance:
    """End the VMM, move the new files into place and record the result.

    Idempotent: recovery repeats it after a crash.
    """
    await destroy.end_vmm(rooms, instance)
    await in_thread(_into_place, rooms.directory(instance.id), instance)
    settled = msgspec.structs.replace(instance, vmm=None)
    await in_thread(rooms.store.save, settled, done=True, durable=True)
    return settled


@os_errors("put the files of a snapshot into place")
def _into_place(directory: Path, instance: Instance) -> None:
    directories.clear_runtime(directory)
    if instance.capture is None:
        directories.clear_capture(directory)
    for name in (*directories.CAPTURED, *disks.names_in(directory / _STAGING)):
        if (directory / _STAGING / name).exists():
            (directory / _STAGING / name).rename(directory / name)
    if instance.capture is not None:
        directories.place_memory(directory, instance.capture)  # removes layers of the memory that was there
    disks.remove_others(directory, instance)
    sync(directory)
    directories.remove(directory / _STAGING)
