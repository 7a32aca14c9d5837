"""Where things are in the data directory. Every path is built here, from validated ids only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from coppice.errors import HostCannot
from coppice.names import is_id


def default_home() -> Path:
    """COPPICE_HOME, else /var/lib/coppice as root, else ~/.local/share/coppice, or `coppice` in XDG_DATA_HOME where that is set.

    :raises HostCannot: this user has no home directory
    """
    if chosen := os.environ.get("COPPICE_HOME"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/coppice")
    try:
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "coppice"
    except RuntimeError as error:  # a user id that is in no list of users, as containers have them
        raise HostCannot(
            "this user has no home directory", hint="set COPPICE_HOME to a directory of its own"
        ) from error


@dataclass(frozen=True)
class Layout:
    """The data directory."""

    home: Path

    @property
    def database(self) -> Path:
        return self.home / "coppice.db"

    @property
    def images(self) -> Path:
        return self.home / "images"

    @property
    def kernels(self) -> Path:
        return self.home / "kernels"

    @property
    def initramfs(self) -> Path:
        return self.home / "initramfs"

    @property
    def overlays(self) -> Path:
        return self.home / "overlays"

    @property
    def instances(self) -> Path:
        return self.home / "instances"

    @property
    def snapshots(self) -> Path:
        return self.home / "snapshots"

    @property
    def volumes(self) -> Path:
        return self.home / "volumes"

    @property
    def locks(self) -> Path:
        return self.home / "locks"

    def instance(self, instance_id: str) -> Path:
        """The directory of one instance."""
        if not is_id(instance_id):
            raise ValueError(f"not an id: {instance_id!r}")
        return self.instances / instance_id

    def snapshot(self, snapshot_id: str) -> Path:
        """The directory of one snapshot."""
        if not is_id(snapshot_id):
            raise ValueError(f"not an id: {snapshot_id!r}")
        return self.snapshots / snapshot_id

    def volume(self, volume_id: str) -> Path:
        """The directory of one volume."""
        if not is_id(volume_id):
            raise ValueError(f"not an id: {volume_id!r}")
        return self.volumes / volume_id

    def volume_disk(self, volume_id: str) -> Path:
        """The disk of one volume: instances have links to it."""
        return self.volume(volume_id) / "data.raw"

    def lock(self, instance_id: str) -> Path:
        """The lock file of one instance, snapshot or volume: outside of its directory, which comes and goes under the lock."""
        if not is_id(instance_id):
            raise ValueError(f"not an id: {instance_id!r}")
        return self.locks / f"{instance_id}.lock"

    def create(self) -> None:
        """Make the directories, for the owner alone. Idempotent.

        :raises HostCannot: the data directory cannot be made or written
        """
        try:
            for path in (
                self.home,
                self.images,
                self.kernels,
                self.initramfs,
                self.overlays,
                self.instances,
                self.snapshots,
                self.volumes,
                self.locks,
            ):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self.home, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            raise HostCannot(
                f"the data directory {self.home} cannot be used: {error.strerror}",
                hint="set COPPICE_HOME to one that can",
            ) from error
