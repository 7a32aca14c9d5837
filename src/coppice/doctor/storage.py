"""Checks of the data directory: can forks share files there, and is there room."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path, PurePosixPath

from coppice.disk.clone import clone_file
from coppice.doctor.mounts import Mount, mount_of, read_mounts
from coppice.errors import CoppiceError
from coppice.model import GIB, MIB, Check
from coppice.store.database import MIGRATIONS
from coppice.store.layout import Layout

NETWORK_TYPES = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.s3fs"})
MEMORY_TYPES = frozenset({"tmpfs", "ramfs"})

_FAIL_BELOW = 2 * GIB
_WARN_BELOW = 10 * GIB
_BETTER = "set COPPICE_HOME to a directory on a local xfs or btrfs"


def nearest_directory(path: Path) -> Path:
    """The directory itself, or the nearest above it that exists."""
    resolved = path.resolve()
    return next((parent for parent in (resolved, *resolved.parents) if parent.is_dir()), Path("/"))


def file_system(home: Path, where: Path) -> Check:
    """What kind of file system the data directory is on."""
    return judge_file_system(
        str(home), mount_of(PurePosixPath(where), read_mounts()), writable=os.access(where, os.W_OK)
    )


def judge_file_system(home: str, mount: Mount | None, *, writable: bool) -> Check:
    """`mount` is the one that holds the data directory."""
    name = "data directory"
    if mount is None:
        return Check(name=name, status="warn", detail=f"{home}: its file system is not known", cure=_BETTER)
    detail = f"{home} on {mount.type} ({mount.point})"
    if not writable or "ro" in mount.options:
        return Check(
            name=name, status="fail", detail=f"{detail} is not writable", cure="set COPPICE_HOME to one that is"
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
    """Whether the records can be read, whole, and by this version; they are only read."""
    path = Layout(home.absolute()).database
    if not path.exists():
        return Check(name="database", status="ok", detail="none yet")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1.0)) as connection:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            damage = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        version, damage = 0, str(error)
    return judge_database(version, damage)


def judge_database(version: int, damage: str) -> Check:
    """`damage` is `ok`, or what SQLite found or could not do."""
    name = "database"
    if damage != "ok":
        cure = "put a copy of coppice.db in its place, or set COPPICE_HOME to another directory"
        return Check(name=name, status="fail", detail=f"cannot be used: {damage}", cure=cure)
    if version > len(MIGRATIONS):
        detail = f"it has schema {version}, this Coppice knows {len(MIGRATIONS)}"
        cure = "use the newer Coppice that wrote it, or set COPPICE_HOME to another directory"
        return Check(name=name, status="fail", detail=detail, cure=cure)
    return Check(name=name, status="ok", detail=f"schema {version}")


def hard_links(where: Path) -> Check:
    """Try a hard link: it is how a fork owns the memory it shares."""
    with tempfile.TemporaryDirectory(dir=where, prefix=".coppice-doctor-") as directory:
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
    """Try a reflink, and see that its blocks are shared."""
    with tempfile.TemporaryDirectory(dir=where, prefix=".coppice-doctor-") as directory:
        source = Path(directory, "source")
        source.write_bytes(b"\xa5" * MIB)
        try:
            shared = clone_file(source, Path(directory, "clone")).method == "reflink"
        except CoppiceError as error:
            return Check(name="reflinks", status="warn", detail=error.message, cure=error.hint or _BETTER)
    return judge_reflinks(shared)


def judge_reflinks(shared: bool) -> Check:
    """`shared`: a clone shares its blocks with its source."""
    if shared:
        return Check(name="reflinks", status="ok", detail="work: a fork's disk costs what it writes")
    return Check(
        name="reflinks",
        status="warn",
        detail="do not work: a fork copies the written part of its source's disk",
        cure=_BETTER,
    )


def free_space(where: Path) -> Check:
    """Room on the file system, for this user."""
    state = os.statvfs(where)
    return judge_free_space(state.f_bavail * state.f_frsize)


def judge_free_space(free_bytes: int) -> Check:
    """A template takes up to the memory of its guest, and each fork what it writes."""
    detail = f"{free_bytes / GIB:.1f} GiB"
    cure = "free some, with `coppice gc` and `coppice image rm`; or set COPPICE_HOME to a larger file system"
    if free_bytes >= _WARN_BELOW:
        return Check(name="free space", status="ok", detail=detail)
    return Check(name="free space", status="fail" if free_bytes < _FAIL_BELOW else "warn", detail=detail, cure=cure)
