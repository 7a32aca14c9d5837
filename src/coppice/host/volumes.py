"""Use cases of volumes: named disks that outlive the instances that they are attached to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from coppice.completion import complete, in_stoppable_thread, in_thread
from coppice.disk.atomic import os_errors
from coppice.errors import InUse, NotFound, UsageError
from coppice.host.admission import Admission, demand_of_volume
from coppice.images.ext4 import volume_from_archive
from coppice.instance import volume as volumes
from coppice.model import GIB, ProgressSink, Record, Volume, VolumeDisk, VolumeMount, no_progress
from coppice.names import check_mounts, check_name, check_reference, check_tags, check_volume_size, new_id
from coppice.ownership import no_volume, owns
from coppice.store import locks

VolumeReference = str | Volume
"""How a caller names a volume: by name, by id, or by a record that it was given."""


class VolumeInspection(Record, frozen=True, kw_only=True):
    """All that is known of one volume."""

    volume: Volume
    disk: str  # its file
    disk_bytes: int  # allocated
    link_count: int  # the file's names: its own, and one of each that it is attached to


class Volumes(Admission):
    """Disks that outlive instances."""

    async def volume_create(
        self,
        name: str,
        *,
        size_bytes: int = GIB,
        archive: Path | str | None = None,
        tags: Mapping[str, str] | None = None,
        progress: ProgressSink = no_progress,
    ) -> Volume:
        """Make a volume: a disk with an ext4 file system, which takes room as it is filled. `run` attaches it.

        It is empty, or has what is in a tar `archive` (plain, or compressed by gzip, zstd, xz or bzip2): owners, modes, times, links and extended
        attributes too, but no devices.

        :raises NameTaken: another volume has the name
        :raises ImageError: the archive is corrupt, truncated or unsafe, or has a device in it
        :raises UsageError: there is no such archive, or what is in it does not fit
        :raises NoSpace: the disk is full
        """
        made = Volume(
            id=new_id(),
            name=check_name(name),
            size_bytes=check_volume_size(size_bytes),
            created_at=time.time(),
            owner=self.owner,
            tags=check_tags(tags or {}),
        )
        source = Path(archive) if archive is not None else None
        admit = await self._admit(await in_thread(demand_of_volume, made, source))

        def create(cancelled: threading.Event) -> None:
            fill = None
            if source is not None:
                fill = partial(
                    volume_from_archive, source, size_bytes=made.size_bytes, progress=progress, cancelled=cancelled
                )
            volumes.create(self.rooms, made, fill)

        with os_errors(f"make the volume {made.name}"):
            try:
                # First: a lock file without a record is nobody's.
                await in_thread(self.rooms.store.volumes.create, made, volumes.CREATION, admit)
                async with locks.hold(self.rooms.layout.lock(made.id), what=made.name):
                    await in_stoppable_thread(create)
            except BaseException:
                with contextlib.suppress(InUse):  # it was whole, and somebody has it already
                    await complete(self._remove_volume(made))
                raise
        return made

    async def volume_ls(self, *, tags: Mapping[str, str] | None = None) -> list[Volume]:
        """The owner's volumes, oldest first, that have all of `tags`, each with who has it. The operator sees all."""
        return [
            each
            for each in await in_thread(self.rooms.store.volumes.all)
            if owns(self.owner, each) and (tags or {}).items() <= each.tags.items()
        ]

    async def volume_inspect(self, reference: VolumeReference) -> VolumeInspection:
        """One volume with who has it and the room that it takes.

        :raises NotFound: there is none
        """
        found = await self._volume(reference)
        disk = self.rooms.layout.volume_disk(found.id)
        with os_errors(f"look at the volume {found.name}"):
            status = await in_thread(disk.stat)
        return VolumeInspection(
            volume=found, disk=str(disk), disk_bytes=status.st_blocks * 512, link_count=status.st_nlink
        )

    async def volume_rm(self, reference: VolumeReference) -> None:
        """Remove a volume and all that is on it.

        :raises NotFound: there is none
        :raises InUse: instances or snapshots have it; the message names them
        """
        found = await self._volume(reference)
        lock = self.rooms.layout.lock(found.id)
        with os_errors(f"remove the volume {found.name}"):
            async with locks.hold(lock, deadline_s=self.rooms.deadlines.lock, what=found.name):
                try:
                    found = await self._volume(found)
                except NotFound:
                    lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
                    raise
                await complete(self._remove_volume(found))

    async def _remove_volume(self, found: Volume) -> None:
        # Also on a full disk only with its journal row: without it somebody could be given the volume while it goes.
        await in_thread(self.rooms.store.volumes.begin_removal, found, volumes.REMOVAL)
        await volumes.remove(self.rooms, found.id)

    async def _volume(self, reference: VolumeReference) -> Volume:
        key = reference.id if isinstance(reference, Volume) else check_reference(reference)
        found = await in_thread(self.rooms.store.volumes.get, key)
        if not owns(self.owner, found):
            raise no_volume(key)
        return found

    async def _disks(self, mounts: Sequence[VolumeMount]) -> tuple[VolumeDisk, ...]:
        """The disks that a new machine is to have.

        :raises NotFound: there is no such volume
        :raises UsageError: the same volume is asked for twice
        :raises InUse: another instance has one, and one of the two is to write to it
        """
        disks: list[VolumeDisk] = []
        for mount in check_mounts(mounts):
            found = await self._volume(mount.volume)
            if any(disk.volume_id == found.id for disk in disks):
                raise UsageError(f"the volume {found.name} cannot be attached twice", hint="mount it at one path")
            disks.append(
                VolumeDisk(
                    volume_id=found.id,
                    volume_name=found.name,
                    size_bytes=found.size_bytes,
                    mount_path=mount.mount_path,
                    readonly=mount.readonly,
                )
            )
        # Before anything is fetched for nothing. Only the instance's record takes them.
        await in_thread(self.rooms.store.volumes.require_free, disks)
        return tuple(disks)
