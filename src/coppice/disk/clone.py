"""Clone files and directories: by reflink where the file system can, else a copy that keeps the holes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from coppice.disk.atomic import TEMPORARY_SUFFIX, os_errors, publish, sync_directory, temporary_beside
from coppice.disk.extents import data_ranges, occupancy
from coppice.errors import HostCannot

FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h; the same on x86_64 and aarch64

LEFT_OUT_SUFFIXES = (".log", ".lock", ".pid", ".sock", TEMPORARY_SUFFIX)
"""Files of a process, not of the machine: `clone_directory` leaves them out, and sockets, fifos, devices."""

_CHUNK = 1 << 20
_ZEROS = bytes(4096)
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY})


class CloneResult(NamedTuple):
    """What one clone cost. `bytes_written` is data that is not proven to be shared with the source."""

    bytes_written: int
    method: Literal["reflink", "sparse"]
    shared_bytes: int


class DirectoryClone(NamedTuple):
    """What the clone of a directory cost, and what it left out (paths relative to the source)."""

    files: int
    bytes_written: int
    shared_bytes: int
    left_out: tuple[str, ...]


def clone_file(
    source: Path, destination: Path, *, mode: int = 0o600, reflink: bool = True, sync: bool = True
) -> CloneResult:
    """Clone a regular file, replacing `destination` atomically.

    The method is `reflink` only where FIEMAP shows that all of the clone's extents are shared. With `reflink=False`
    every byte is read and written, whatever the file system could share. With `sync=False` the clone does not survive a
    power loss until the caller syncs it: for use inside of a pause. A source that is a symbolic link is refused.

    Raises NoSpace, IntegrityError (no such source) or HostCannot; no temporary file is left behind.
    """
    with os_errors(f"clone {source} to {destination}"), open_source(source) as src:
        temporary = temporary_beside(destination)
        dst = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                result = _clone_contents(src, dst, reflink=reflink)
                os.fchmod(dst, mode)
                if sync:
                    os.fsync(dst)
            finally:
                os.close(dst)
            publish(temporary, destination, sync=sync)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return result


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[int]:
    """Open a regular file for reading and yield the descriptor; never follows a link, never blocks on a fifo.

    Raises OSError as open(2) does, and HostCannot if the path is something else than a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise HostCannot(f"{path} is not a regular file", hint="see what took its place in the data directory")
        yield fd
    finally:
        os.close(fd)


def clone_directory(
    source: Path, destination: Path, *, skip: Collection[str] = (), sync: bool = True
) -> DirectoryClone:
    """Clone the contents of a directory into one that is there and empty.

    `skip` names paths relative to `source`, a directory with all that is below it. `LEFT_OUT_SUFFIXES`, sockets, fifos
    and devices are left out too. Symbolic links are copied as links and never followed; holes, modes and modification
    times are kept. With `sync=False` the clone does not survive a power loss until the caller syncs it.

    Raises Refused if `destination` has something in it, else what `clone_file` raises. A failure leaves what was made so
    far: whoever made the directory removes it, as after a crash.
    """
    with os_errors(f"clone the directory {source} to {destination}"):
        if any(destination.iterdir()):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        files = written = shared = 0
        left_out: list[str] = []
        for result in _clone_tree(source, destination, "", frozenset(skip), left_out, sync=sync):
            files += 1
            written += result.bytes_written
            shared += result.shared_bytes
        return DirectoryClone(files, written, shared, tuple(sorted(left_out)))


def _clone_tree(
    source: Path, destination: Path, prefix: str, skip: frozenset[str], left_out: list[str], *, sync: bool
) -> Iterator[CloneResult]:
    with os.scandir(source) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        relative = prefix + entry.name
        info = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(info.st_mode)
        target = destination / entry.name
        if relative in skip or (entry.name.endswith(LEFT_OUT_SUFFIXES) and kind != stat.S_IFDIR):
            left_out.append(relative)
            continue
        if kind == stat.S_IFLNK:
            target.symlink_to(Path(entry.path).readlink())
        elif kind == stat.S_IFDIR:
            target.mkdir(mode=0o700)
            yield from _clone_tree(Path(entry.path), target, relative + "/", skip, left_out, sync=sync)
            continue  # its own mode and times were set after its contents
        elif kind == stat.S_IFREG:
            yield clone_file(Path(entry.path), target, mode=stat.S_IMODE(info.st_mode), sync=sync)
        else:
            left_out.append(relative)
            continue
        os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)
    info = source.stat()
    destination.chmod(stat.S_IMODE(info.st_mode))
    os.utime(destination, ns=(info.st_atime_ns, info.st_mtime_ns))
    if sync:
        sync_directory(destination)


def _clone_contents(src: int, dst: int, *, reflink: bool) -> CloneResult:
    if reflink and _reflink(src, dst):
        size = os.fstat(dst).st_size
        written = sum(length for _, length in data_ranges(dst, size))
        try:
            extents = occupancy(dst)
        except OSError:  # the file system cannot tell: not proven, so not claimed
            return CloneResult(written, "sparse", 0)
        if extents.shared_bytes == extents.mapped_bytes:
            return CloneResult(0, "reflink", extents.shared_bytes)
        return CloneResult(extents.mapped_bytes - extents.shared_bytes, "sparse", extents.shared_bytes)
    return CloneResult(_copy_sparse(src, dst, in_kernel=reflink), "sparse", 0)


def _reflink(src: int, dst: int) -> bool:
    try:
        fcntl.ioctl(dst, FICLONE, src)
    except OSError as error:
        # EXDEV: another file system; EOPNOTSUPP/ENOTTY/EINVAL: no reflinks here; ETXTBSY: a swap file.
        if error.errno in _NO_KERNEL_COPY | {errno.ENOTTY}:
            return False
        raise
    return True


def _copy_sparse(src: int, dst: int, *, in_kernel: bool) -> int:
    """Copy the data ranges only; returns the bytes written. The destination is empty."""
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
    """copy_file_range over one data range; returns how far it came before the kernel declined."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(src, dst, length - done, start + done, start + done)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if count == 0:
            break
        done += count
    return done


def _copy_nonzero(src: int, dst: int, start: int, length: int) -> int:
    """Copy one range through memory; blocks of zeros are left as holes. Returns the bytes written."""
    written, end = 0, start + length
    while start < end:
        chunk = os.pread(src, min(_CHUNK, end - start), start)
        if not chunk:
            raise OSError(errno.EIO, "the source shrank while it was copied")
        for offset, part in nonzero_parts(chunk):
            write_all(dst, part, start + offset)
            written += len(part)
        start += len(chunk)
    return written


def nonzero_parts(chunk: bytes) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) of the maximal runs of 4 KiB blocks of `chunk` that are not all zero.

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
            # Released even if it raises: else the traceback would keep a view, and the caller's buffer could not be closed.
            with view[done:] as rest:
                done += os.pwrite(fd, rest, offset + done)
