"""Helpers of volume tests: a volume at a path, a machine with it, and an expected refusal."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Sequence
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import InUse
from coppice.machine import disks
from coppice.machine.disk import frozen
from coppice.machine.volumes import disk_of
from coppice.model import MIB, Instance, Snapshot, VolumeMount
from coppice.vmm import driver as files
from fakes.hosting import boot, snapshot

SIZE = 16 * MIB
_PAGE = 4096


def at(path: str, volume: str = "data", *, readonly: bool = False) -> VolumeMount:
    """Return a mount of a volume at a path."""
    return VolumeMount(volume=volume, mount_path=path, readonly=readonly)


WRITES = (at("/data"),)
READS = (at("/data", readonly=True),)


async def with_volume(host: AsyncHost, volumes: Sequence[VolumeMount], name: str = "oak") -> Instance:
    """Return a Running instance with these volumes."""
    return await boot(host, name, volumes=volumes)


def own_link(host: AsyncHost, instance: Instance, number: int = 0) -> Path:
    """Return the instance's link to its volume."""
    return host.local.rooms.directory(instance.id) / files.VOLUME_DISK.format(number)


def put(host: AsyncHost, instance: Instance, text: str, number: int = 0) -> None:
    """Write text to the last page of a volume, as a machine's guest would."""
    top = paths_of(host, instance, number)[-1]
    assert not frozen(top), "a guest never writes to a frozen file"
    with top.open("r+b") as file:
        file.seek(-_PAGE, os.SEEK_END)
        file.write(text.encode().ljust(_PAGE, b"\0"))


def got(host: AsyncHost, holder: Instance | Snapshot, number: int = 0) -> str:
    """Return the text in the last page of the volume of an instance or snapshot, through its layers."""
    return _text(paths_of(host, holder, number))


def paths_of(host: AsyncHost, holder: Instance | Snapshot, number: int = 0) -> list[Path]:
    """Return the paths of the files of a volume that a machine writes to, as its present record has them."""
    rooms, name = host.local.rooms, disks.VOLUMES[number]
    of_snapshot = isinstance(holder, Snapshot)
    now = rooms.store.snapshots.get(holder.id) if of_snapshot else rooms.store.get(holder.id)
    (disk,) = [each for each in disks.of(now) if each.name == name]
    return disk.paths((rooms.layout.snapshot if of_snapshot else rooms.layout.instance)(holder.id))


def got_of_volume(host: AsyncHost, name: str = "data") -> str:
    """Return the text in the last page of a volume that no machine writes to."""
    rooms = host.local.rooms
    volume = rooms.store.volumes.get(name)
    return _text(disk_of(volume).paths(rooms.layout.volume(volume.id)))


def _text(paths: list[Path]) -> str:
    found = (path.read_bytes()[-_PAGE:].rstrip(b"\0").decode() for path in reversed(paths))
    return next((text for text in found if text), "")


async def refused(host: AsyncHost, work: Awaitable[object], match: str) -> InUse:
    """Assert that the work is refused with exit status 4 and a hint, before any side effect."""
    before = snapshot(host)
    with pytest.raises(InUse, match=match) as caught:
        await work
    assert snapshot(host) == before
    assert caught.value.exit_code == 4
    assert caught.value.hint
    return caught.value
