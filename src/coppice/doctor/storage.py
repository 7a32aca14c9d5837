"""Checks of the data directory: whether forks can share files in it, and its free space."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path, PurePosixPath

from coppice.errors import CoppiceError
from coppice.linux.mounts import Mount, mount_of, read_mounts
from coppice.linux.reflinks import has_reflinks
from coppice.model import GIB, Check
from coppice.state.layout import PROBE_PREFIX, Layout
from coppice.state.migrations import MIGRATIONS
from coppice.vmm.firecracker import host as firecracker_host

NETWORK_TYPES = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.s3fs"})
MEMORY_TYPES = frozenset({"tmpfs", "ramfs"})

_FAIL_BELOW = 2 * GIB
_WARN_BELOW = 10 * GIB
_STORAGE_FROM = 20 * GIB  # half of less free space is too little for images and machines
_BETTER = "set COPPICE_HOME to a directory on a local xfs or btrfs"


def nearest_directory(path: Path) -> Path:
    """Return the directory, or its nearest existing parent."""
    resolved = path.resolve()
    return next((parent for parent in (resolved, *resolved.parents) if parent.is_dir()), Path("/"))


def file_system(home: Path, where: Path) -> Check:
    """Check the kind of file system that the data directory is on."""
    return judge_file_system(
        str(home), mount_of(PurePosixPath(where), read_mounts()), writable=os.access(where, os.W_OK)
    )


def judge_file_system(home: str, mount: Mount | None, *, writable: bool) -> Check:
    """Judge the mount that holds the data directory."""
    name = "data directory"
    if mount is None:
        return Check(name=name, status="warn", detail=f"{home}: its file system is not known", cure=_BETTER)
    detail = f"{home} on {mount.type} ({mount.point})"
    if not writable or "ro" in mount.options:
        return Check(
            name=name,
            status="fail",
            detail=f"{detail} is not writable",
            cure=f"remount it if it is read-only: `mount -o remount,rw {mount.point}`; or set COPPICE_HOME",
        )
    if mount.type in MEMORY_TYPES:
        return Check(
            name=name, status="warn", detail=f"{detail} is lost at the next boot, and takes up memory", cure=_BETTER
        )
    if mount.type in NETWORK_TYPES or mount.type.startswith("fuse"):
        return Check(
            name=name, status="warn", detail=f"{detail}: guest memory would be mapped from there", cure=_BETTER
        )
    return Check(name=name, status="ok", detail=detail)


def database(home: Path) -> Check:
    """Check whether the database is undamaged, and readable by this version. It is only read."""
    path = Layout(home.absolute()).database
    if not path.exists():
        return Check(name="database", status="ok", detail="none yet")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1.0)) as connection:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            damage = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_READONLY,
        ):  # no damage
            return Check(
                name="database",
                status="fail",
                detail=f"{path} cannot be opened",
                cure="let this user read and write the data directory; its file system must not be read-only",
            )
        version, damage = 0, str(error)
    return judge_database(version, damage)


def judge_database(version: int, damage: str) -> Check:
    """Judge the schema version, and `damage`: `ok`, or SQLite's message."""
    name = "database"
    if damage != "ok":
        cure = "replace coppice.db by a backup, or set COPPICE_HOME to another directory"
        return Check(name=name, status="fail", detail=f"cannot be used: {damage}", cure=cure)
    if version > len(MIGRATIONS):
        detail = f"it has schema {version}, this Coppice knows {len(MIGRATIONS)}"
        cure = "use the newer Coppice that wrote it, or set COPPICE_HOME to another directory"
        return Check(name=name, status="fail", detail=detail, cure=cure)
    return Check(name=name, status="ok", detail=f"schema {version}")


def hard_links(where: Path) -> Check:
    """Try a hard link, by which a fork holds its shared memory."""
    with tempfile.TemporaryDirectory(dir=where, prefix=PROBE_PREFIX) as directory:
        source = Path(directory, "source")
        source.touch()
        try:
            Path(directory, "link").hardlink_to(source)
        except OSError as error:
            return Check(
                name="hard links",
                status="fail",
                detail=f"do not work ({error.strerror}): every fork would copy the whole memory of its template",
                cure=_BETTER,
            )
    return Check(name="hard links", status="ok", detail="work: forks share the memory file of their template")


def reflinks(where: Path) -> Check:
    """Try a reflink, and check that it shares blocks."""
    try:
        shared = has_reflinks(where)
    except CoppiceError as error:
        return Check(name="reflinks", status="warn", detail=error.message, cure=error.hint or _BETTER)
    state = os.statvfs(where)
    free = state.f_bavail * state.f_frsize
    return judge_reflinks(shared, firecracker=_has_firecracker(), free_bytes=free, root=os.geteuid() == 0)


def _has_firecracker() -> bool:
    try:
        firecracker_host.program()
    except CoppiceError:
        return False
    return True


def judge_reflinks(shared: bool, *, firecracker: bool = False, free_bytes: int = 0, root: bool = False) -> Check:
    """Judge whether a clone shares its blocks with its source. Root can have that anywhere.

    :param firecracker: whether Firecracker is installed: under QEMU a clone is a layer, which copies nothing
    """
    if shared:
        return Check(name="reflinks", status="ok", detail="work: a fork's disk costs what it writes")
    detail = "do not work: under Firecracker the disks of forks and clones of volumes are copies"
    if not firecracker:
        return Check(name="reflinks", status="ok", detail=detail)
    return Check(
        name="reflinks",
        status="warn",
        detail=detail,
        cure=f"run `coppice storage init --size {free_bytes // 2 // GIB}G`, or {_BETTER}"
        if root and free_bytes >= _STORAGE_FROM
        else _BETTER,
    )


def free_space(where: Path) -> Check:
    """Check the free space for this user on the file system."""
    state = os.statvfs(where)
    return judge_free_space(state.f_bavail * state.f_frsize)


def judge_free_space(free_bytes: int) -> Check:
    """Judge free space: a template needs up to its guest's memory, and each fork its own writes."""
    detail = f"{free_bytes / GIB:.1f} GiB"
    cure = "free space with `coppice gc` and `coppice image rm`, or set COPPICE_HOME to a larger file system"
    if free_bytes >= _WARN_BELOW:
        return Check(name="free space", status="ok", detail=detail)
    return Check(name="free space", status="fail" if free_bytes < _FAIL_BELOW else "warn", detail=detail, cure=cure)
