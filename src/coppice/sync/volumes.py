"""Host: disks that outlive instances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coppice.host import VolumeInspection, VolumeReference
from coppice.model import GIB, ProgressSink, Volume, no_progress
from coppice.sync.base import HostBase


class Volumes(HostBase):
    """Disks that outlive instances."""

    def volume_create(
        self,
        name: str,
        *,
        size_bytes: int = GIB,
        archive: Path | str | None = None,
        tags: Mapping[str, str] | None = None,
        progress: ProgressSink = no_progress,
    ) -> Volume:
        return self._portal.call(
            self._host.volume_create(name, size_bytes=size_bytes, archive=archive, tags=tags, progress=progress)
        )

    def volume_ls(self, *, tags: Mapping[str, str] | None = None) -> list[Volume]:
        return self._portal.call(self._host.volume_ls(tags=tags))

    def volume_inspect(self, reference: VolumeReference) -> VolumeInspection:
        return self._portal.call(self._host.volume_inspect(reference))

    def volume_rm(self, reference: VolumeReference) -> None:
        self._portal.call(self._host.volume_rm(reference))
