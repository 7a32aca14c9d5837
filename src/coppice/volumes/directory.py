"""Volumes: their directories, and the links that instances have to them.

A volume is the file volumes/ID/data.raw, and may have layers over it: data.1... (see
`coppice.machine.volumes`). Each holder has a hard link to each file. While a volume
is made or removed, the journal has a row for it, and lookups skip it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from coppice.completion import in_thread
from coppice.linux.clone import clone_file
from coppice.linux.files import os_errors, publish, sync, temporary_beside
from coppice.machine import directory as directories
from coppice.machine import disks
from coppice.machine import volumes as attached
from coppice.machine.disk import allocated
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Volume, VolumeDisk
from coppice.state import locks
from coppice.vmm.driver import VmmDriver
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


async def place(rooms: Rooms, instance: Instance) -> Instance:
    """Give a recorded instance its own links to its volumes; return the record, saved if they have layers.

    A read-only mount cannot replay a journal, so the journal that a killed machine left is written
    back first. Its VMM, and VMMs without disk layers, need a raw file. No writer can come in between,
    since the instance's record keeps all writers out.

    :raises IntegrityError: a volume is gone, or its journal cannot be replayed
    :raises HostCannot: it cannot be linked
    :raises NoSpace: the disk is full
    """
    directory, driver = rooms.directory(instance.id), rooms.driver(instance)
    for number, disk in enumerate(instance.machine.volumes):
        volume = await in_thread(rooms.store.volumes.get, disk.volume_id)
        if await in_thread(_obstacle, rooms, volume, disk, driver) is not None:
            lock = rooms.layout.lock(volume.id)
            async with locks.hold(lock, deadline_s=rooms.deadlines.lock, what=f"the volume {volume.name}"):
                volume = await in_thread(_make_usable, rooms, disk, driver, directory)
        if volume.layers:  # recorded before they are there: see `give_back`
            layers = {**instance.disk_layers, disks.VOLUMES[number]: volume.layers}
            instance = msgspec.structs.replace(instance, disk_layers=layers)
            await in_thread(rooms.store.save, instance)
        paths = attached.disk_of(volume).paths(rooms.layout.volume(volume.id))
        await in_thread(attached.link, directory, number, paths, readonly=disk.readonly)
    return instance


def bytes_of_place(rooms: Rooms, volumes: Sequence[VolumeDisk], driver: VmmDriver) -> int:
    """Return the most bytes that `place` writes for these volumes. Blocks."""
    found = [(rooms.store.volumes.get(each.volume_id), each) for each in volumes]
    return sum(
        allocated(attached.disk_of(volume).paths(rooms.layout.volume(volume.id)))
        for volume, each in found
        if _obstacle(rooms, volume, each, driver) == "shared"
    )


@os_errors("look at a volume")
def _obstacle(
    rooms: Rooms, volume: Volume, wanted: VolumeDisk, driver: VmmDriver
) -> Literal["shared", "journal"] | None:
    """Return why a machine cannot use a volume as it is; None if it can.

    `shared`: it must become a raw file without other links, which clones of the volume have.
    `journal`: its journal must be replayed.
    """
    raw, *layers = attached.disk_of(volume).paths(rooms.layout.volume(volume.id))
    form = driver.capabilities.layer_format
    if layers and (wanted.readonly or form != rooms.drivers.named(volume.driver).capabilities.layer_format):
        return "shared"
    replays = wanted.readonly and ext4.needs_recovery(raw)
    if (replays or not (wanted.readonly or form)) and raw.stat().st_nlink > 1:
        return "shared"
    return "journal" if replays else None


def _make_usable(rooms: Rooms, wanted: VolumeDisk, driver: VmmDriver, directory: Path) -> Volume:
    """Remove the obstacles for a machine, if they still exist; return the volume. The caller holds its lock.

    :param directory: the machine's, in which a new file is made: it goes with the machine if this process is killed
    """
    volume = rooms.store.volumes.get(wanted.volume_id)
    raw, *layers = attached.disk_of(volume).paths(rooms.layout.volume(volume.id))
    if _obstacle(rooms, volume, wanted, driver) == "shared":
        with os_errors(f"make the volume {volume.name} a raw file"):
            new = temporary_beside(directory / raw.name)
            try:
                if layers:
                    rooms.drivers.named(volume.driver).flatten_disk(raw, layers, new)
                else:
                    clone_file(raw, new, sync=False)
                sync(new)
                publish(new, raw)  # the layers over it change nothing, so the record is right before and after
            finally:
                new.unlink(missing_ok=True)
        volume = msgspec.structs.replace(volume, layers=(), driver="")
        attached.keep(rooms, volume)
    if wanted.readonly:
        if ext4.needs_recovery(raw):  # nothing else has the file, or it is "shared"
            raw.chmod(0o600)  # clones that are gone have left it frozen
        ext4.replay_journal(raw)
    return volume
