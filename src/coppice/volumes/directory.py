"""Volumes: their directories, and the links that instances have to them.

A volume is one file, volumes/ID/data.raw. Each holder has a hard link to that file. While a volume
is made or removed, the journal has a row for it, and lookups skip it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coppice.completion import in_thread
from coppice.linux.files import sync
from coppice.machine import directory as directories
from coppice.machine import volumes as attached
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Volume
from coppice.state import locks
from coppice.volumes import disk as volume
from coppice.volumes import ext4


def create(rooms: Rooms, made: Volume, fill: Callable[[Path], None] | None = None) -> None:
    """Make the disk of a recorded volume, durably, and finish its record.

    Blocks. The caller removes the volume if this fails.

    :param fill: makes the disk at a path; without it, the volume is empty
    :raises MissingTool: mke2fs is not installed
    :raises NoSpace: the disk is full
    """
    directories.create(rooms.layout.volume(made.id))
    disk = rooms.layout.volume_disk(made.id)
    fill(disk) if fill is not None else volume.create(disk, made.size_bytes)
    sync(rooms.layout.volumes)
    rooms.store.volumes.finish(made)


async def remove(rooms: Rooms, volume_id: str) -> None:
    """Remove a volume with its files and its record.

    Idempotent. The caller holds its lock, or is the only one that knows its id.
    """
    await in_thread(directories.remove, rooms.layout.volume(volume_id))
    locks.remove(rooms.layout.lock(volume_id))  # before the record: nothing would remove a lock file without a record
    await in_thread(rooms.store.volumes.forget, volume_id)


async def place(rooms: Rooms, instance: Instance) -> None:
    """Give a recorded instance its own links to its volumes.

    A read-only mount cannot replay a journal, so the journal that a killed machine left is written
    back first. No writer can come in between, since the instance's record keeps all writers out.

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
        await in_thread(attached.link, directory, number, path, readonly=disk.readonly)
