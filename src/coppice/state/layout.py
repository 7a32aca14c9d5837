"""The paths of the data directory. Every path is built here, from validated ids only."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from coppice.errors import HostCannot, UsageError
from coppice.linux.files import sync
from coppice.model import Record
from coppice.names import is_id

PROBE_PREFIX = ".coppice-doctor-"
"""Begins the names of directories in which something is tried. `gc` removes those that were left."""


def data_directory(chosen: Path | str | None = None) -> Path:
    """Return the absolute path of the chosen data directory. Default: COPPICE_HOME, or
    /var/lib/coppice for root, or `coppice` in XDG_DATA_HOME or ~/.local/share.

    :raises HostCannot: this user has no home directory
    :raises UsageError: the path is not UTF-8, which neither SQLite nor JSON can name
    """
    home = (_default() if chosen is None else Path(chosen)).absolute()
    try:
        str(home).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the path of the data directory is not UTF-8: {str(home)!r}", hint="set COPPICE_HOME to another directory"
        ) from error
    return home


def _default() -> Path:
    if chosen := os.environ.get("COPPICE_HOME"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/coppice")
    try:
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "coppice"
    except RuntimeError as error:  # a user id without an entry in /etc/passwd, as in containers
        raise HostCannot(
            "this user has no home directory", hint="set COPPICE_HOME to a directory of its own"
        ) from error


class Layout(Record, frozen=True, dict=True):
    """The data directory."""

    home: Path

    @property
    def database(self) -> Path:
        return self.home / "coppice.db"

    @property
    def images(self) -> Path:
        return self.home / "images"

    @property
    def blobs(self) -> Path:
        """The cache of layers that were pulled from registries, one directory for each owner."""
        return self.home / "blobs"

    @property
    def kernels(self) -> Path:
        return self.home / "kernels"

    @property
    def initramfs(self) -> Path:
        return self.home / "initramfs"

    @property
    def overlays(self) -> Path:
        return self.home / "overlays"

    @functools.cached_property
    def instances(self) -> Path:
        return self.home / "instances"

    @functools.cached_property
    def snapshots(self) -> Path:
        return self.home / "snapshots"

    @functools.cached_property
    def volumes(self) -> Path:
        return self.home / "volumes"

    def supervisor_lock(self, owner: str | None) -> Path:
        """Return the lock of the process that supervises all instances, or those of one owner."""
        return self.home / f"supervisor{f'-{owner}' if owner else ''}.lock"

    @property
    def uploads(self) -> Path:
        """Files that clients of a server send for a request, while it uses them."""
        return self.home / "uploads"

    @functools.cached_property
    def locks(self) -> Path:
        return self.home / "locks"

    def instance(self, instance_id: str) -> Path:
        """Return the directory of one instance."""
        return _of_id(self.instances, instance_id)

    def snapshot(self, snapshot_id: str) -> Path:
        """Return the directory of one snapshot."""
        return _of_id(self.snapshots, snapshot_id)

    def volume(self, volume_id: str) -> Path:
        """Return the directory of one volume."""
        return _of_id(self.volumes, volume_id)

    def volume_disk(self, volume_id: str) -> Path:
        """Return the disk file of one volume, to which instances have hard links."""
        return self.volume(volume_id) / "data.raw"

    def lock(self, instance_id: str) -> Path:
        """Return the lock file of an instance, snapshot or volume.

        It is outside the directory that is made and removed under the lock.
        """
        return _of_id(self.locks, instance_id, ".lock")

    def create(self) -> None:
        """Make the directories, accessible to the owner only. Idempotent.

        :raises HostCannot: the data directory cannot be made or written
        """
        try:
            for path in (
                self.home,
                self.images,
                self.blobs,
                self.kernels,
                self.initramfs,
                self.overlays,
                self.instances,
                self.snapshots,
                self.volumes,
                self.locks,
            ):
                _make(path)
            if not os.access(self.home, os.W_OK | os.X_OK):
                read_only = os.statvfs(self.home).f_flag & os.ST_RDONLY
                raise PermissionError(13, "its file system is read-only" if read_only else "not writable")
        except OSError as error:
            raise HostCannot(
                f"cannot use the data directory {self.home}: {error.strerror}",
                hint="make it writable, or set COPPICE_HOME to another directory; see `coppice doctor`",
            ) from error


@functools.lru_cache(maxsize=1024)  # each operation needs the same paths again and again
def _of_id(directory: Path, object_id: str, suffix: str = "") -> Path:
    if not is_id(object_id):
        raise ValueError(f"not an id: {object_id!r}")
    return directory / f"{object_id}{suffix}"


def _make(path: Path) -> None:
    """Make a directory and its missing parents, and sync their names, so that its contents survive
    a power cut.
    """
    missing = [path, *path.parents]
    missing = missing[: next(number for number, each in enumerate(missing) if each.exists())]
    for each in reversed(missing):
        each.mkdir(mode=0o700 if each == path else 0o777, exist_ok=True)
        sync(each.parent)
