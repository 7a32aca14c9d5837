"""Clone files: by reflink if the file system supports it, else by a sparse copy."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from coppice import stopping
from coppice.errors import HostCannot
from coppice.linux.extents import data_ranges, occupancy
from coppice.linux.files import os_errors, publish, temporary_beside

FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h; the same on x86_64 and aarch64

_CHUNK = 1 << 20
_KERNEL_CHUNK = 64 << 20  # one call cannot be interrupted
_ZEROS = bytes(4096)
_without_reflinks: set[tuple[int, int]] = set()  # file systems that were found to have none; that never changes
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY})


class CloneResult(NamedTuple):
    """The cost of one clone.

    `bytes_written` counts data that is not proven to be shared with the source.
    """

    bytes_written: int
    method: Literal["reflink", "sparse"]
    shared_bytes: int


def clone_file(
    source: Path, destination: Path, *, mode: int = 0o600, reflink: bool = True, sync: bool = True
) -> CloneResult:
    """Clone a regular file, replacing `destination` atomically.

    The method is `reflink` only if FIEMAP shows that all of the clone's extents are shared. With
    `reflink=False` every byte is read and written. With `sync=False` the clone does not survive a
    power loss until the caller syncs it; this is for use during a pause. A source that is a
    symbolic link is refused. No temporary file stays behind, even if the caller is cancelled.

    Raises NoSpace, IntegrityError (no such source) or HostCannot.
    """
    with _replacing(source, destination) as (src, dst, temporary):
        result = clone_contents(src, dst, reflink=reflink)
        os.fchmod(dst, mode)
        if sync:
            os.fsync(dst)
        publish(temporary, destination, sync=sync)
    return result


def reflink_file(source: Path, destination: Path, *, mode: int = 0o600) -> bool:
    """Clone a regular file by reflink, replacing `destination` atomically; not synced.

    Return False, and leave nothing behind, if the file system cannot.

    Raises NoSpace, IntegrityError (no such source) or HostCannot.
    """
    with os_errors(f"look at {destination.parent}"):
        if _file_system(destination.parent) in _without_reflinks:
            return False
    with _replacing(source, destination) as (src, dst, temporary):
        if done := _reflink(src, dst):
            os.fchmod(dst, mode)
            publish(temporary, destination, sync=False)
    return done


@contextlib.contextmanager
def _replacing(source: Path, destination: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield descriptors of a source and of a new file next to `destination`, and the path of that
    file, which is removed unless the block publishes it.
    """
    with os_errors(f"clone {source} to {destination}"), open_source(source) as src:
        temporary = temporary_beside(destination)
        dst = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            yield src, dst, temporary
        finally:
            os.close(dst)
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[int]:
    """Open a regular file for reading and yield the descriptor.

    Never follow a link or block on a fifo.

    Raises OSError as open(2) does, and HostCannot if the path is not a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise HostCannot(f"{path} is not a regular file", hint="check what replaced it in the data directory")
        yield fd
    finally:
        os.close(fd)


def clone_contents(src: int, dst: int, *, reflink: bool) -> CloneResult:
    """Clone or copy what is in one open file to another, empty one."""
    if reflink and _reflink(src, dst):
        size = os.fstat(dst).st_size
        written = sum(length for _, length in data_ranges(dst, size))
        try:
            extents = occupancy(dst)
        except OSError:  # the file system has no FIEMAP: sharing is not proven, so not claimed
            return CloneResult(written, "sparse", 0)
        if extents.shared_bytes == extents.mapped_bytes:
            return CloneResult(0, "reflink", extents.shared_bytes)
        return CloneResult(extents.mapped_bytes - extents.shared_bytes, "sparse", extents.shared_bytes)
    return CloneResult(_copy_sparse(src, dst, in_kernel=reflink), "sparse", 0)


def _file_system(place: int | Path) -> tuple[int, int]:
    """Return what tells a file system from others, also from one that is mounted later from the same device."""
    return os.stat(place).st_dev, os.statvfs(place).f_fsid  # noqa: PTH116 - of a descriptor too, and for each fork


def _reflink(src: int, dst: int) -> bool:
    file_system = _file_system(dst)
    if file_system in _without_reflinks:
        return False
    try:
        fcntl.ioctl(dst, FICLONE, src)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            _without_reflinks.add(file_system)
        # EXDEV: another file system; EOPNOTSUPP/ENOTTY/EINVAL: no reflinks here; ETXTBSY: a swap
        # file.
        if error.errno in _NO_KERNEL_COPY | {errno.ENOTTY}:
            return False
        raise
    return True


def _copy_sparse(src: int, dst: int, *, in_kernel: bool) -> int:
    """Copy only the data ranges into an empty destination; return the bytes written."""
    size = os.fstat(src).st_size
    os.ftruncate(dst, size)
    written = 0
    for start, length in data_ranges(src, size):
        copied = _copy_in_kernel(src, dst, start, length) if in_kernel else 0
        in_kernel = copied > 0
        written += copied
        if copied < length:
            written += _copy_nonzero(src, dst, start + copied, length - copied)
    return written


def _copy_in_kernel(src: int, dst: int, start: int, length: int) -> int:
    """Copy one data range with copy_file_range; return the bytes copied before the kernel
    declined.
    """
    done = 0
    while done < length:
        stopping.check()
        try:
            count = os.copy_file_range(src, dst, min(_KERNEL_CHUNK, length - done), start + done, start + done)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if count == 0:
            break
        done += count
    return done


def _copy_nonzero(src: int, dst: int, start: int, length: int) -> int:
    """Copy one range through memory, leaving blocks of zeros as holes. Return the bytes written."""
    written, end = 0, start + length
    while start < end:
        stopping.check()
        chunk = os.pread(src, min(_CHUNK, end - start), start)
        if not chunk:
            raise OSError(errno.EIO, "the source shrank while it was copied")
        for offset, part in nonzero_parts(chunk):
            write_all(dst, part, start + offset)
            written += len(part)
        start += len(chunk)
    return written


def nonzero_parts(chunk: bytes) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) of each maximal run of 4 KiB blocks of `chunk` that are not all zero.

    Blocks are counted from the start of the chunk; the last one may be short.
    """
    view, block = memoryview(chunk), len(_ZEROS)
    run = 0
    for offset in range(0, len(chunk), block):
        piece = chunk[offset : offset + block]
        if piece == _ZEROS[: len(piece)]:
            if run < offset:
                yield run, view[run:offset]
            run = offset + block
    if run < len(chunk):
        yield run, view[run:]


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite until all of `data` is written. Raises OSError."""
    done = 0
    with memoryview(data) as view:
        while done < len(view):
            # Release the view even if pwrite raises: the traceback would keep it alive, and the
            # caller could not close its buffer.
            with view[done:] as rest:
                done += os.pwrite(fd, rest, offset + done)
