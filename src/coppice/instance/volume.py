"""Volumes: their directories, and how an instance comes by its own links to them.

A volume is one file, volumes/ID/data.raw. Whoever has it has a hard link to that file. While it is made or removed the journal has a row for it, and nobody
finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coppice.completion import in_thread
from coppice.disk import ext4, volume
from coppice.disk.atomic import sync_directory
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import Instance, Volume
from coppice.store import locks

CREATION = "volume"  # journal of a volume that is not whole yet
REMOVAL = "volume-rm"  # journal of one that is going


def create(rooms: Rooms, made: Volume, fill: Callable[[Path], None] | None = None) -> None:
    """Make the disk of a recorded volume, durably, and finish its record. Blocks. The caller removes the volume if this fails.

    :param fill: makes the disk at a path; without, it is empty
    :raises MissingTool: mke2fs is not installed
    :raises NoSpace: the disk is full
    """
    directories.create(rooms.layout.volume(made.id))
    disk = rooms.layout.volume_disk(made.id)
    fill(disk) if fill is not None else volume.create(disk, made.size_bytes)
    sync_directory(rooms.layout.volumes)
    rooms.store.volumes.finish(made)
    rooms.store.sync()


async def remove(rooms: Rooms, volume_id: str) -> None:
    """Remove a volume and all that is its own. Idempotent; the caller holds its lock, or is alone in knowing it."""
    await in_thread(directories.remove, rooms.layout.volume(volume_id))
    rooms.layout.lock(volume_id).unlink(missing_ok=True)  # before the record: a lock file without one would be nobody's
    await in_thread(rooms.store.volumes.forget, volume_id)


async def place(rooms: Rooms, instance: Instance) -> None:
    """Give a recorded instance its own links to its volumes.

    Who only reads cannot replay a journal: what a machine that was killed has left in it is written back before. Nobody else can come between, since the
    instance's record keeps every writer out.

    :raises IntegrityError: a volume is gone, or its journal cannot be replayed
    :raises HostCannot: it cannot be linked
    """
    for number, disk in enumerate(instance.machine.volumes):
        path = rooms.layout.volume_disk(disk.volume_id)
        if disk.readonly and await in_thread(ext4.needs_recovery, path):
            lock = rooms.layout.lock(disk.volume_id)
            async with locks.hold(lock, deadline_s=rooms.deadlines.lock, what=f"the volume {disk.volume_name}"):
                await in_thread(ext4.replay_journal, path)
        directory = rooms.directory(instance.id)
        await in_thread(directories.place_volume, directory, number, path, readonly=disk.readonly)
