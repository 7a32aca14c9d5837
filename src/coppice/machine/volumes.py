"""The volumes of an instance or snapshot: links to volumes that it holds, and clones of its own. All functions block.

A clone is made for a fork of a machine that writes to a volume. It belongs to the fork as the
overlay disk does: captures have its stamp, forks and snapshots of the fork have clones of it, and it
is removed with the fork's directory.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from coppice.errors import HostCannot
from coppice.linux.clone import clone_file
from coppice.linux.files import os_errors
from coppice.model import MachineSpec
from coppice.names import MAX_VOLUMES
from coppice.vmm import driver as files

DISKS = tuple(files.VOLUME_DISK.format(number) for number in range(MAX_VOLUMES))


def link(directory: Path, number: int, volume: Path, *, readonly: bool) -> None:
    """Link a volume into the directory, as the machine's volume `number`.

    With `readonly` the file's mode becomes 0444, so that no process can write to it.

    :raises HostCannot: the volume cannot be linked; a copy would be a different volume
    """
    own = directory / DISKS[number]
    try:
        os.link(volume, own, follow_symlinks=False)
        own.chmod(0o444 if readonly else 0o600)
    except OSError as error:
        raise HostCannot(
            f"the volume {volume} cannot be attached: {error.strerror}",
            hint="keep the data directory on one file system with hard links; `stat -c %h FILE` counts those of a file",
        ) from error


def with_clones(machine: MachineSpec) -> MachineSpec:
    """Return the machine of a fork: it has clones of the volumes that its source writes to."""
    disks = tuple(disk if disk.readonly else msgspec.structs.replace(disk, private=True) for disk in machine.volumes)
    return msgspec.structs.replace(machine, volumes=disks)


@os_errors("place a volume")
def place(source: Path, directory: Path, machine: MachineSpec) -> int:
    """Give a directory the volumes of another one: links to read-only ones, clones of the others.
    Idempotent. Not synced.

    Nothing may write to the volumes meanwhile: the machine is at rest or paused.

    :return: the bytes written
    :raises NoSpace: the disk is full
    """
    bytes_written = 0
    for number, volume in enumerate(machine.volumes):
        name = DISKS[number]
        if os.path.lexists(directory / name):
            continue
        if volume.readonly:
            link(directory, number, source / name, readonly=True)
        else:
            bytes_written += clone_file(source / name, directory / name, sync=False).bytes_written
    return bytes_written


def written(directory: Path, machine: MachineSpec) -> list[Path]:
    """Return the paths of the volumes that a machine writes to. A fork or snapshot of it has clones of them."""
    numbers = [number for number, volume in enumerate(machine.volumes) if not volume.readonly]
    return [directory / DISKS[number] for number in numbers]


def private(directory: Path, machine: MachineSpec) -> list[Path]:
    """Return the paths of a machine's own clones of volumes."""
    numbers = [number for number, volume in enumerate(machine.volumes) if volume.private]
    return [directory / DISKS[number] for number in numbers]
