"""An instance's directory: what is placed in it, and how it goes away. All functions block.

Everything that an instance maps or opens is in its own directory as its own link or clone, never as a path into somebody else's:
the mem-file, the vmstate, the image's root, the kernel. So no delete, rename or re-capture elsewhere can reach it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import NamedTuple

from coppice.disk.atomic import is_temporary, os_errors, sync_directory, temporary_beside
from coppice.disk.clone import clone_directory
from coppice.disk.link import link_or_copy
from coppice.disk.overlay import OverlayStore
from coppice.errors import HostCannot, IntegrityError, NoSpace
from coppice.memory import memfile
from coppice.model import Instance, MachineSpec, MemFile, Sharing
from coppice.names import MAX_VOLUMES
from coppice.vmm import driver as files

CAPTURED = (files.MEMORY, files.VMSTATE, files.OVERLAY_DISK)
VOLUME_DISKS = tuple(files.VOLUME_DISK.format(number) for number in range(MAX_VOLUMES))
_LINKED = (files.MEMORY, files.VMSTATE, files.ROOT_DISK, files.KERNEL, files.INITRD, *VOLUME_DISKS)
_REMOVED = ".removed"
LOG_KEPT = 8 << 20  # bytes
_REMOVALS = 8  # whoever has just found the directory may still make a port's lock file in it, once for each port
_RUNTIME = (
    files.LIVE_MEMORY,
    files.VMSTATE_NEW,
    "memory.new",
    "qmp.sock",
    *map(files.PORT_SOCKET.format, range(files.PORTS)),
)


class Placed(NamedTuple):
    """What placing a fork's files cost and gave."""

    mem_file: MemFile | None
    bytes_written: int


def create(directory: Path) -> None:
    """Make the directory, for the owner alone.

    :raises NoSpace: the file system is full
    """
    try:
        directory.mkdir(mode=0o700)
    except OSError as error:
        raise _no_space(error) from error


def place_root(directory: Path, root: Path) -> None:
    """Link the image's root into the directory: the image may be removed while it runs. Idempotent."""
    _link(root, directory / files.ROOT_DISK)


def place_overlay(directory: Path, overlays: OverlayStore, size_bytes: int) -> None:
    """Give the instance an empty writable disk."""
    overlays.create(size_bytes, directory / files.OVERLAY_DISK)


def place_volume(directory: Path, number: int, disk: Path, *, readonly: bool) -> None:
    """Link a volume into the directory, as the machine's volume of that number. Its mode follows: read-only, nobody can write to it at all.

    :raises HostCannot: it cannot be linked; a copy would be another volume, and cost the room of one
    """
    own = directory / files.VOLUME_DISK.format(number)
    try:
        os.link(disk, own, follow_symlinks=False)
        own.chmod(0o444 if readonly else 0o600)
    except OSError as error:
        raise HostCannot(
            f"the volume {disk} cannot be attached: {error.strerror}",
            hint="the data directory must be on one file system that has hard links, of which a file can have only so many",
        ) from error


def place_kernel(directory: Path, kernel: Path, initrd: Path) -> None:
    """Link a kernel and its initrd (or their stubs, for a restore), replacing those that are there."""
    for source, name in ((kernel, files.KERNEL), (initrd, files.INITRD)):
        (directory / name).unlink(missing_ok=True)
        _link(source, directory / name)


def place_fork(source: Path, directory: Path, instance: Instance, *, with_memory: bool, shareable: bool) -> Placed:
    """Fill a fork's directory, which is empty, from its source's: links to what never changes, clones of what does.

    Parameters and errors are those of `place_capture`.
    """
    # What is written to is cloned: the overlay disk, and whatever else an instance may have of its own some day.
    written = clone_directory(source, directory, skip=(*_LINKED, *_RUNTIME), sync=False).bytes_written
    (directory / files.OVERLAY_DISK).chmod(0o600)  # that of a snapshot is read-only
    placed = place_capture(source, directory, instance, with_memory=with_memory, shareable=shareable)
    return Placed(placed.mem_file, written + placed.bytes_written)


def place_capture(source: Path, directory: Path, instance: Instance, *, with_memory: bool, shareable: bool) -> Placed:
    """Link what never changes of a source's files: the root, read-only volumes, and `with_memory` the mem-file and vmstate.

    `shareable` is the driver's word that a restore maps the mem-file privately; without it the file is copied.

    :raises IntegrityError: the source's mem-file is not what was captured
    :raises NoSpace: the disk is full
    """
    _link(source / files.ROOT_DISK, directory / files.ROOT_DISK)
    link_volumes(source, directory, instance.machine)
    if not with_memory or instance.mem_file is None:
        return Placed(None, 0)
    if shareable:
        mem_file, written = memfile.link(source / files.MEMORY, directory / files.MEMORY, instance.mem_file)
    else:
        reason = "the driver does not map mem-files privately"
        mem_file, written = memfile.copy_private(source / files.MEMORY, directory / files.MEMORY, reason=reason)
    return Placed(mem_file, written + link_or_copy(source / files.VMSTATE, directory / files.VMSTATE).bytes_written)


def make_durable(directory: Path) -> None:
    """Have what was placed survive a power cut: its memory may be what a guest wrote a moment ago, and its disk is a copy of now.

    :raises NoSpace: delayed allocation finds no room
    """
    with os_errors(f"make {directory} durable"):
        sync_captured(directory)
        sync_directory(directory.parent)


def sync_captured(directory: Path) -> list[Path]:
    """Sync what there is of a memory, its device state and a disk, and their names; return their paths. Blocks; raises OSError."""
    present = [path for name in CAPTURED if (path := directory / name).exists()]
    for path in present:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)
    return present


def link_volumes(source: Path, directory: Path, machine: MachineSpec) -> None:
    """Give what is made of a machine its own links to the machine's volumes, which are all read-only. Idempotent."""
    for number, disk in enumerate(machine.volumes):
        if not disk.readonly:
            raise AssertionError("a volume that is written to has one holder")
        name = files.VOLUME_DISK.format(number)
        if not os.path.lexists(directory / name):
            place_volume(directory, number, source / name, readonly=True)


def clear_runtime(directory: Path) -> None:
    """Remove what only a running VMM or an unfinished capture needs. Idempotent."""
    for name in _RUNTIME:
        (directory / name).unlink(missing_ok=True)
    clear_temporaries(directory)


def trim_logs(directory: Path) -> None:
    """Keep the newest lines of logs that have grown large; to be called before a VMM is started, when nobody writes them. Idempotent.

    They go on from start to start, and a VMM cannot write a file beyond its limit: one that was full would stay as it is for good.
    """
    for path in (directory / files.CONSOLE_LOG, directory / files.VMM_LOG):
        if path.exists() and path.stat().st_size > LOG_KEPT:
            with path.open("rb") as log:
                log.seek(-LOG_KEPT, os.SEEK_END)
                log.readline()  # half a line
                newest = log.read()
            new = temporary_beside(path)
            try:
                new.write_bytes(newest)
                new.rename(path)
            except OSError:  # the disk is full: the log stays as it is, and the machine starts
                new.unlink(missing_ok=True)


def clear_temporaries(directory: Path) -> None:
    """Remove what a killed process left half-written; the caller holds the instance's lock, so nobody else writes. Idempotent."""
    if directory.exists():
        for path in [path for path in directory.iterdir() if is_temporary(path.name)]:
            path.unlink(missing_ok=True)


def clear_capture(directory: Path) -> None:
    """Remove the mem-file and vmstate: this instance's links to them, that is. Idempotent."""
    for name in (files.MEMORY, files.VMSTATE):
        (directory / name).unlink(missing_ok=True)


def remove(directory: Path) -> None:
    """Remove the directory (or file) and all in it. Idempotent; it is renamed first, so that a half-removed one never has an instance's name."""
    doomed = directory if directory.name.startswith(".") else directory.with_name(f".{directory.name}{_REMOVED}")
    with contextlib.suppress(FileNotFoundError):
        directory.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        for _ in range(_REMOVALS):
            shutil.rmtree(doomed, ignore_errors=True)
            if not doomed.exists():
                break
    else:
        doomed.unlink(missing_ok=True)


def is_half_removed(path: Path) -> bool:
    """Whether the path is what a killed `remove` left."""
    return path.name.startswith(".") and path.name.endswith(_REMOVED)


def disk_stamp(directory: Path) -> str:
    """Names the content of the disks as of now: if it is the same later, nobody has written to the overlay or to a volume."""
    volumes = (path for path in (directory / name for name in VOLUME_DISKS) if path.exists())
    return " ".join(file_stamp(path) for path in (directory / files.OVERLAY_DISK, *volumes))


def file_stamp(path: Path) -> str:
    """Names the content of one file that is only written to in place."""
    status = path.stat()
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def capture_is_current(directory: Path, stamp: str) -> bool:
    """Whether memory, vmstate and disk are there and still of one instant."""
    if not all((directory / name).exists() for name in (files.MEMORY, files.VMSTATE, files.OVERLAY_DISK)):
        return False
    return disk_stamp(directory) == stamp


def require_current(directory: Path, instance: Instance) -> None:
    """Refuse a capture whose disk has moved on: its memory knows another file system than it would find.

    :raises IntegrityError: memory, vmstate or disk is missing, or the disk was written to since the capture
    """
    if not capture_is_current(directory, instance.disk_stamp):
        raise IntegrityError(
            f"the memory and the disks of {instance.name} are not of one instant: a file is gone, or a disk was written to",
            hint="something else has worked in its directory; remove it, and capture its source again",
        )


def _link(source: Path, destination: Path) -> None:
    if not os.path.lexists(destination):
        link_or_copy(source, destination)


def _no_space(error: OSError) -> Exception:
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return NoSpace("the file system of the data directory is full", hint="free some space, or run `coppice gc`")
    return error


def sharing_of(mem_file: MemFile | None) -> Sharing | None:
    """How the instance came by its mem-file; None where it has none."""
    return mem_file.sharing if mem_file else None


def exists(directory: Path) -> bool:
    """Whether the instance has its files."""
    return os.path.lexists(directory / files.OVERLAY_DISK)


def overlay_bytes(directory: Path) -> int:
    """Bytes that the overlay disk has allocated; 0 where there is none."""
    try:
        return (directory / files.OVERLAY_DISK).stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def allocated_bytes(path: Path) -> int:
    """Bytes that would be freed by removing the path: files with other links do not count."""
    total = 0
    for file in (path, *(Path(top, name) for top, _, names in os.walk(path) for name in names)):
        with contextlib.suppress(FileNotFoundError):  # somebody else removes it at the same time
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                total += status.st_blocks * 512
    return total
