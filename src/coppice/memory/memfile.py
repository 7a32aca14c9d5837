"""The mem-file: guest RAM as a file that never changes once it is frozen (invariants 1 to 3)."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from coppice import stopping
from coppice.errors import IntegrityError
from coppice.linux.clone import clone_file, open_source
from coppice.linux.extents import data_ranges
from coppice.linux.files import os_errors, publish
from coppice.linux.link import IMMUTABLE, link_or_copy
from coppice.model import MemFile, Progress, ProgressSink, Sharing, no_progress

_CHUNK = 1 << 20
_REPORT_EVERY = 64 << 20


def freeze(live: Path, frozen: Path) -> MemFile:
    """Make a finished memory image immutable under its final name.

    The order is data, mode, name: after a crash the final name is absent, or its previous file, or
    the whole new file. Nothing may still map the file shared and writable. The data is synced,
    which takes as long as the disk needs for unwritten data.

    Raises IntegrityError if `live` is missing, NoSpace if delayed allocation finds the disk full,
    HostCannot.
    """
    with os_errors(f"freeze {live} as {frozen}"):
        with open_source(live) as fd:
            os.fchmod(fd, IMMUTABLE)
            os.fsync(fd)
            info = os.fstat(fd)
        publish(live, frozen)
    return _mem_file(info, Sharing.OWN)


def link(source: Path | str, destination: Path | str, expected: MemFile | None) -> tuple[MemFile, int]:
    """Make `destination` a link to the mem-file `source`, or a copy with the reason for it; also
    return the bytes written.

    With `expected`, the source is checked first, and a link must have that inode. The hash carries
    over.

    Raises IntegrityError if the source has changed since the capture, Refused if `destination`
    exists, NoSpace, HostCannot.
    """
    if expected is not None:
        check(source, expected)
    result = link_or_copy(source, destination)
    with os_errors(f"look at {destination}"):
        info = os.lstat(destination)
    if expected is not None and result.sharing is Sharing.HARDLINK and info.st_ino != expected.inode:
        Path(destination).unlink(missing_ok=True)
        raise _differs(source, f"its inode is {info.st_ino}, not {expected.inode}")
    sha256 = expected.sha256 if expected is not None else None
    return _mem_file(info, result.sharing, result.reason, sha256), result.bytes_written


def describe(path: Path) -> MemFile:
    """Return the record of an instance's own memory file.

    Raises IntegrityError if the file is missing, HostCannot.
    """
    with os_errors(f"look at {path}"):
        return _mem_file(path.stat(), Sharing.OWN)


def allocated(path: Path) -> int:
    """Return the allocated bytes of a file. Raises IntegrityError if it is missing, HostCannot."""
    with os_errors(f"look at {path}"):
        return path.stat().st_blocks * 512


def check(path: Path | str, expected: MemFile) -> None:
    """Compare a mem-file with its record from the capture or link. Costs one lstat.

    The device number is not compared: it may change with a reboot.

    Raises IntegrityError that names the difference: missing, type, inode, size or mode.
    """
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _differs(path, "it is missing") from error
    if not stat.S_ISREG(info.st_mode):
        raise _differs(path, "it is not a regular file")
    if info.st_ino != expected.inode:
        raise _differs(path, f"its inode is {info.st_ino}, not {expected.inode}")
    if info.st_size != expected.size_bytes:
        raise _differs(path, f"its size is {info.st_size} bytes, not {expected.size_bytes}")
    if info.st_mode & 0o222:
        raise _differs(path, f"its mode is {stat.S_IMODE(info.st_mode):04o}, so it is writable")


def sha256(
    path: Path, *, progress: ProgressSink = no_progress, cancelled: Callable[[], bool] = lambda: False
) -> str | None:
    """Return the SHA-256 of the whole file in hexadecimal, or None if `cancelled`, called once per
    MiB, returns true.

    Holes are hashed as zeros without being read. Raises IntegrityError if the file is missing or
    shrinks meanwhile.
    """
    digest = hashlib.sha256()
    zeros = memoryview(bytes(_CHUNK))
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    done = reported = 0
    with os_errors(f"hash {path}"), open_source(path) as fd:
        size = os.fstat(fd).st_size
        data = data_ranges(fd, size)
        start, length = next(data, (size, 0))
        while done < size:
            stopping.check()
            if cancelled():
                return None
            if done < start:
                count = min(_CHUNK, start - done)
                digest.update(zeros[:count])
            else:
                count = os.preadv(fd, [view[: min(_CHUNK, start + length - done)]], done)
                if count == 0:
                    raise _differs(path, f"it ended at {done} of {size} bytes during the read")
                digest.update(view[:count])
            done += count
            if done >= start + length:
                start, length = next(data, (size, 0))
            if done - reported >= _REPORT_EVERY or done == size:
                reported = done
                progress(Progress(stage="hash", done=done, total=size, unit="bytes"))
    return digest.hexdigest()


def copy_private(source: Path, destination: Path, *, reason: str) -> tuple[MemFile, int]:
    """Make a full copy that shares nothing with the source; also return the bytes written.

    For the naive baseline of the benchmark, and for hosts without hard links. Blocks of zeros
    become holes.

    Raises IntegrityError if the source is missing, NoSpace, HostCannot.
    """
    result = clone_file(source, destination, mode=IMMUTABLE, reflink=False)
    with os_errors(f"look at {destination}"):
        info = destination.lstat()
    return _mem_file(info, Sharing.COPY, reason), result.bytes_written


def _mem_file(info: os.stat_result, sharing: Sharing, reason: str = "", sha256: str | None = None) -> MemFile:
    return MemFile(
        inode=info.st_ino,
        device=info.st_dev,
        size_bytes=info.st_size,
        sharing=sharing,
        reason=reason,
        sha256=sha256,
    )


def _differs(path: Path | str, difference: str) -> IntegrityError:
    return IntegrityError(
        f"The mem-file {path} differs from its capture: {difference}",
        difference=difference,
        hint="remove this instance, and fork again from a source that `coppice verify` finds intact",
    )
