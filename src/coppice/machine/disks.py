"""All writable disks of an instance or snapshot: its overlay, and the volumes that it writes to. All functions block.

The record has the layers of each disk by its name (`Instance.disk_layers`). A volume that a machine
writes to is either a clone of its own, or a named volume. The machine has the latest layers of both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from coppice.content.overlay import OverlayStore
from coppice.linux.files import os_errors
from coppice.machine import disk
from coppice.machine.disk import Disk, Layers
from coppice.model import Instance, MachineSpec, Snapshot, VolumeDisk
from coppice.names import MAX_VOLUMES
from coppice.vmm import driver as files
from coppice.vmm.driver import VmmDriver

LayersByName = Mapping[str, Layers]

VOLUMES: Final = tuple(files.VOLUME.format(number) for number in range(MAX_VOLUMES))
_FILE: Final = re.compile(rf"({files.OVERLAY}|{'|'.join(VOLUMES)})(?:{re.escape(files.RAW)}|\.(\d+))")


class Placed(NamedTuple):
    """The layers of the disks that were placed, and the bytes written for them."""

    layers: dict[str, Layers]
    bytes_written: int


def of(holder: Instance | Snapshot) -> list[Disk]:
    """Return the disks that a machine writes to, named volumes included, in the order of their devices."""
    return of_machine(holder.machine, holder.disk_layers)


def of_machine(machine: MachineSpec, layers: LayersByName) -> list[Disk]:
    """Return the disks that a machine writes to, as `of`."""
    sizes = {files.OVERLAY: machine.overlay_bytes}
    for name, volume in zip(VOLUMES, machine.volumes, strict=False):
        if not volume.readonly:
            sizes[name] = volume.size_bytes
    return [Disk(name, size_bytes, layers.get(name, ())) for name, size_bytes in sizes.items()]


def own(holder: Instance | Snapshot) -> list[Disk]:
    """Return the disks that belong to a machine alone: its overlay, and its clones of volumes."""
    named = {name for name, volume in zip(VOLUMES, holder.machine.volumes, strict=False) if not volume.private}
    return [each for each in of(holder) if each.name not in named]


def named(holder: Instance | Snapshot) -> list[tuple[Disk, VolumeDisk]]:
    """Return the named volumes that a machine writes to."""
    by_name = dict(zip(VOLUMES, holder.machine.volumes, strict=False))
    belonging = own(holder)
    return [(each, by_name[each.name]) for each in of(holder) if each not in belonging]


def recorded(of: Iterable[Disk]) -> dict[str, Layers]:
    """Return the layers of disks as a record has them."""
    return {each.name: each.layers for each in of if each.layers}


def are_full(holder: Instance | Snapshot) -> bool:
    """Return whether a fork would have to merge the layers of a disk."""
    return any(each.is_full for each in of(holder))


def paths(directory: Path, of: Iterable[Disk]) -> list[Path]:
    """Return the paths of the files of disks."""
    return [path for each in of for path in each.paths(directory)]


def names_in(directory: Path) -> list[str]:
    """Return the names of all files of disks in a directory, recorded or not, of read-only volumes too."""
    try:
        return sorted(name for name in os.listdir(directory) if _FILE.fullmatch(name))  # noqa: PTH208 - a fork does this many times
    except FileNotFoundError:
        return []


def among(names: Iterable[str], machine: MachineSpec) -> list[str]:
    """Return those names that are of files of the disks that a machine writes to, in order."""
    written = {each.name for each in of_machine(machine, {})}
    return sorted(name for name in names if (found := _FILE.fullmatch(name)) and found[1] in written)


def stamped(layers: LayersByName, present: Collection[str]) -> list[str]:
    """Return the names of the files on which the content of a machine's disks depends, of read-only volumes too.

    :param present: the names of all files in the machine's directory
    """
    volumes = [name for name in VOLUMES if name in layers or name + files.RAW in present]
    return [file for name in (files.OVERLAY, *volumes) for file in Disk(name, 0, layers.get(name, ())).files]


def fork(
    source: Path,
    directory: Path,
    holder: Instance | Snapshot,
    drivers: tuple[VmmDriver, VmmDriver],
    overlays: OverlayStore,
    *,
    starts: bool,
) -> Placed:
    """Give a directory the disks of `holder` in another one, as `disk.fork` does."""
    placed = [disk.fork(source, directory, each, drivers, overlays, starts=starts) for each in of(holder)]
    return Placed(recorded(each.disk for each in placed), sum(each.bytes_written for each in placed))


@os_errors("remove layers of a disk")
def remove_others(directory: Path, holder: Instance | Snapshot) -> None:
    """Remove layers that are not part of the recorded disks. Idempotent."""
    kept = {name for each in of(holder) for name in each.files}
    for name in names_in(directory):
        if name not in kept and not name.endswith(files.RAW):
            (directory / name).unlink(missing_ok=True)
