"""Use cases of volumes: named disks that outlive the instances that they are attached to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from coppice.completion import complete, in_own_thread, in_thread
from coppice.errors import InUse, UsageError
from coppice.host.admission import Admission, demand_of_volume
from coppice.linux.files import os_errors, untranslated
from coppice.machine import disk
from coppice.machine import volumes as attached
from coppice.model import ProgressSink, Volume, VolumeDisk, VolumeMount
from coppice.model.inspection import VolumeInspection
from coppice.model.ownership import no_volume, owns
from coppice.names import new_id
from coppice.requests import VolumeCreateRequest, VolumeInspectRequest, VolumeLsRequest, VolumeRmRequest
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.volumes import directory as volumes


class Volumes(Admission):
    """The operations on volumes."""

    async def volume_create(self, request: VolumeCreateRequest, progress: ProgressSink) -> Volume:
        """Record the volume and make its disk."""
        made = Volume(
            id=new_id(),
            name=request.name,
            size_bytes=request.size_bytes,
            created_at=time.time(),
            owner=self.owner,
            tags=dict(request.tags),
        )
        source = Path(request.archive) if request.archive is not None else None
        admit = await self._admit(partial(demand_of_volume, made, source))

        fill = None
        if source is not None:
            from coppice.volumes.content import volume_from_archive

            fill = partial(volume_from_archive, source, size_bytes=made.size_bytes, progress=progress)
        with untranslated(f"make the volume {made.name}"):
            try:
                # Record first: gc removes a lock file that has no record.
                await in_thread(self.rooms.store.volumes.create, made, JournalOperation.VOLUME, admit)
                async with locks.hold(self.rooms.layout.lock(made.id), what=made.name):
                    await in_own_thread(volumes.create, self.rooms, made, fill)
            except BaseException:
                with contextlib.suppress(InUse):  # it was complete, and is attached already
                    await complete(self._remove_volume(made))
                raise
        return made

    async def volume_ls(self, request: VolumeLsRequest) -> list[Volume]:
        """List the volumes of this host's owner."""
        return [
            each
            for each in await in_thread(self.rooms.store.volumes.all)
            if owns(self.owner, each) and request.tags.items() <= each.tags.items()
        ]

    async def volume_inspect(self, request: VolumeInspectRequest) -> VolumeInspection:
        """Read the volume's record and the size of its disk."""
        found = await self._volume(request.volume)
        raw = self.rooms.layout.volume_disk(found.id)
        with os_errors(f"read the size of the volume {found.name}"):
            links = (await in_thread(raw.stat)).st_nlink
        paths = await in_thread(attached.paths_now, self.rooms, found)
        return VolumeInspection(
            volume=found, disk=str(raw), disk_bytes=await in_thread(disk.allocated, paths), link_count=links
        )

    async def volume_rm(self, request: VolumeRmRequest) -> None:
        """Remove the volume unless it is attached."""
        found = await self._volume(request.volume)
        lock = self.rooms.layout.lock(found.id)
        with untranslated(f"remove the volume {found.name}"):
            async with locks.hold(lock, deadline_s=self.rooms.deadlines.lock, what=found.name):
                with locks.of_record(lock, f"the volume {found.name}"):
                    found = await self._volume(found.id)
                await complete(self._remove_volume(found))

    async def _remove_volume(self, found: Volume) -> None:
        # Even on a full disk the journal row is needed: it keeps a new instance from attaching the
        # volume.
        await in_thread(self.rooms.store.volumes.begin_removal, found, JournalOperation.VOLUME_REMOVE)
        await volumes.remove(self.rooms, found.id)

    async def _volume(self, key: str) -> Volume:
        found = await in_thread(self.rooms.store.volumes.get, key)
        if not owns(self.owner, found):
            raise no_volume(key)
        return found

    async def _disks(self, mounts: Sequence[VolumeMount]) -> tuple[VolumeDisk, ...]:
        """Return the disks for the volumes of a new machine.

        :raises NotFound: there is no such volume
        :raises UsageError: a volume is listed twice
        :raises InUse: another instance has a volume, and one of the two writes to it
        """
        disks: list[VolumeDisk] = []
        for mount in mounts:
            found = await self._volume(mount.volume)
            if any(each.volume_id == found.id for each in disks):
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
        # Check early, before a kernel is fetched in vain. Recording the instance checks again and
        # attaches.
        await in_thread(self.rooms.store.volumes.require_free, disks)
        return tuple(disks)
