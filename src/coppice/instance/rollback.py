"""Restore in place: an instance goes back to a snapshot of itself.

The snapshot's files are first placed beside the instance's own. One commit to the journal decides: before it, the instance is as it was, and runs on if it ran;
after it, what is left is to end its VMM and to rename the new files over the old ones, each of which may be repeated.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from coppice.completion import complete, in_thread
from coppice.disk.atomic import os_errors, sync_directory
from coppice.instance import destroy, snapshot
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import Instance, MemFile, Snapshot, SnapshotKind, State
from coppice.vmm import driver as files

OPERATION = "snapshot-restore"  # journal: until the commit, the instance is as it was
COMMITTED = "snapshot-restore-commit"  # journal: the new files are whole, and only to be put into place
_STAGING = "restore.new"


async def roll_back(rooms: Rooms, instance: Instance, moment: Snapshot) -> Instance:
    """Give an instance the memory and disk of a snapshot of it; return it, Standby or Stopped as the snapshot's kind is. The caller holds both.

    :raises IntegrityError: the snapshot's mem-file is not what was captured
    :raises NoSpace: the disk is full
    """
    try:
        await in_thread(rooms.store.begin, instance, OPERATION)
        mem_file, disk_stamp = await in_thread(_stage, rooms, instance, moment)
        with_memory = mem_file is not None
        target = msgspec.structs.replace(
            instance,
            state=State(moment.kind),
            snapshot=moment.id,
            machine=moment.machine,
            process=moment.process,
            mem_file=mem_file,
            manifest=moment.manifest if with_memory else instance.manifest,
            captured_at=moment.captured_at,
            disk_stamp=disk_stamp if with_memory else "",
            open_ports=moment.open_ports,
            frozen=moment.frozen,
            exit_reason=None,
            # Larger than any that either memory has seen.
            identity_serial=max(instance.identity_serial, moment.identity_serial),
            identified=moment.identified,
        )
        await in_thread(rooms.store.begin, target, COMMITTED)
    except BaseException:
        if await in_thread(rooms.store.is_at, instance.id, COMMITTED):  # it was cancelled too late
            await complete(finish(rooms, target))
        else:
            await complete(undo(rooms, instance))
        raise
    return await complete(finish(rooms, target))


def _stage(rooms: Rooms, instance: Instance, moment: Snapshot) -> tuple[MemFile | None, str]:
    """Place the snapshot's files as a fork's would be; return the mem-file and what names the disk, which renaming keeps."""
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
        shareable=rooms.driver.capabilities.maps_mem_file_privately,
    )
    with os_errors(f"make {staging} durable"), (staging / files.OVERLAY_DISK).open("rb") as disk:
        os.fsync(disk.fileno())
    return placed.mem_file, directories.disk_stamp(staging)


async def undo(rooms: Rooms, instance: Instance) -> None:
    """Leave the instance as it was. Idempotent."""
    await in_thread(directories.remove, rooms.directory(instance.id) / _STAGING)
    await in_thread(rooms.store.save, instance, done=True)


async def finish(rooms: Rooms, instance: Instance) -> Instance:
    """End the VMM, put the new files into place and record it. Idempotent: recovery calls it again after a crash at any point of it."""
    await destroy.end_vmm(rooms, instance)
    await in_thread(_into_place, rooms.directory(instance.id), instance)
    settled = msgspec.structs.replace(instance, vmm=None)
    await in_thread(rooms.store.save, settled, done=True)
    await in_thread(rooms.store.sync)
    return settled


def _into_place(directory: Path, instance: Instance) -> None:
    directories.clear_runtime(directory)
    if instance.mem_file is None:
        directories.clear_capture(directory)
    for name in (*directories.CAPTURED, *directories.VOLUME_DISKS):
        if (directory / _STAGING / name).exists():
            (directory / _STAGING / name).rename(directory / name)
    sync_directory(directory)
    directories.remove(directory / _STAGING)
