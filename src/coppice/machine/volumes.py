"""The volumes of an instance or snapshot: links to volumes that it holds, and clones of its own. All functions block.

A clone is made for a fork of a machine that writes to a volume. It belongs to the fork as the
overlay disk does (see `disks`): it may have layers, captures have its stamp, forks and snapshots of
the fork get it too, and it is removed with the fork's directory.

A named volume may have layers too: its writer was forked, and has gone on in a new one. While it has
a writer, its latest layers are in that machine's directory alone. They go back to the volume's
directory before the machine's is removed (`give_back`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from coppice.errors import NotFound
from coppice.linux.files import is_temporary, os_errors, sync
from coppice.linux.link import IMMUTABLE
from coppice.machine import disks
from coppice.machine.disk import Disk
from coppice.machine.rooms import Rooms
from coppice.model import Instance, MachineSpec, Volume


def disk_of(volume: Volume) -> Disk:
    """Return the disk of a volume as it is in the volume's own directory."""
    return Disk("data", volume.size_bytes, volume.layers)


def paths_now(rooms: Rooms, volume: Volume) -> list[Path]:
    """Return the paths of the files that have the content of a volume: those of its writer, if it has added layers."""
    for holder in volume.attachments:
        if not holder.readonly:
            with contextlib.suppress(NotFound):  # removed meanwhile
                for disk, each in disks.named(rooms.store.get(holder.instance_id)):
                    if each.volume_id == volume.id and disk.layers:
                        return disk.paths(rooms.directory(holder.instance_id))
    return disk_of(volume).paths(rooms.layout.volume(volume.id))


def link(directory: Path, number: int, volume: Sequence[Path], *, readonly: bool) -> None:
    """Link the files of a volume into the directory, as the machine's volume `number`.

    With `readonly` the mode of the topmost one becomes 0444, so that no process can write to it. It
    has that mode too if others have links to it, which only forks of an earlier writer can have: the
    machine needs a layer of its own before it runs.

    :param volume: the paths of its files, from the raw one on
    :raises HostCannot: the volume cannot be linked; a copy would be a different volume
    :raises IntegrityError: a file of the volume is missing
    :raises NoSpace: the disk is full
    """
    with os_errors(f"attach the volume {volume[0]}"):
        shared = volume[-1].stat().st_nlink > 1
        for path in volume:
            link = directory / f"{disks.VOLUMES[number]}{path.suffix}"
            os.link(path, link, follow_symlinks=False)
        link.chmod(IMMUTABLE if readonly or shared else 0o600)


def with_clones(machine: MachineSpec) -> MachineSpec:
    """Return the machine of a fork: it has clones of the volumes that its source writes to."""
    disks = tuple(disk if disk.readonly else msgspec.structs.replace(disk, private=True) for disk in machine.volumes)
    return msgspec.structs.replace(machine, volumes=disks)


@os_errors("place a volume")
def link_readonly(source: Path, directory: Path, machine: MachineSpec) -> None:
    """Give a directory links to the read-only volumes of another one. Idempotent. Not synced."""
    for number, (name, volume) in enumerate(zip(disks.VOLUMES, machine.volumes, strict=False)):
        if volume.readonly:
            (path,) = Disk(name, 0).paths(source)
            if not os.path.lexists(directory / path.name):
                link(directory, number, [path], readonly=True)


@os_errors("give a volume its latest layers")
def give_back(rooms: Rooms, instance: Instance) -> None:
    """Give the volumes that a machine writes to the layers that it has added, and remove what an interrupted
    attachment has left in the directories of its volumes. Durable. Idempotent.

    Its VMM has ended, and its directory is to be removed.

    :raises NoSpace: the disk is full
    :raises HostCannot: a layer has as many hard links as its file system allows: too many forks share it
    """
    if all(volume.private for volume in instance.machine.volumes):
        return
    try:
        instance = rooms.store.get(instance.id)  # a cancelled call does not return what it has recorded
    except NotFound:
        return
    for disk, volume in disks.named(instance):
        held, directory = rooms.store.volumes.get(volume.volume_id), rooms.layout.volume(volume.volume_id)
        given = disk_of(held)._replace(layers=disk.layers)
        own, theirs = disk.paths(rooms.directory(instance.id)), given.paths(directory)
        if held.layers == disk.layers or not own[-1].exists():  # it is given back already, or was never placed
            continue
        for path, link in zip(own, theirs, strict=True):
            if link.exists() and not link.samefile(path):  # of an interrupted attachment
                link.unlink()
            if not link.exists():
                os.link(path, link, follow_symlinks=False)
        sync(directory)
        rooms.store.volumes.save(msgspec.structs.replace(held, layers=disk.layers, driver=instance.driver))
    for volume in instance.machine.volumes:
        if not volume.private and rooms.layout.volume(volume.volume_id).exists():
            _remove_others(rooms, rooms.store.volumes.get(volume.volume_id))


def keep(rooms: Rooms, volume: Volume) -> None:
    """Record the layers of a volume, durably, and remove others from its directory. Idempotent."""
    rooms.store.volumes.save(volume)
    _remove_others(rooms, volume)


def _remove_others(rooms: Rooms, volume: Volume) -> None:
    """Remove layers that are not recorded from the directory of a volume. Idempotent.

    A holder of the volume calls this. Only the removal of the one machine that writes to it adds layers.
    """
    directory, kept = rooms.layout.volume(volume.id), disk_of(volume).files
    for path in [path for path in directory.iterdir() if path.name not in kept and not is_temporary(path.name)]:
        path.unlink(missing_ok=True)
