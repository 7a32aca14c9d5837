"""Helpers of volume tests: a volume at a path, a machine with it, and an expected refusal."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import InUse
from coppice.model import MIB, Instance, VolumeMount
from coppice.vmm import driver as files
from fakes.hosting import boot, snapshot

SIZE = 16 * MIB


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


async def refused(host: AsyncHost, work: Awaitable[object], match: str) -> InUse:
    """Assert that the work is refused with exit status 4 and a hint, before any side effect."""
    before = snapshot(host)
    with pytest.raises(InUse, match=match) as caught:
        await work
    assert snapshot(host) == before
    assert caught.value.exit_code == 4
    assert caught.value.hint
    return caught.value
