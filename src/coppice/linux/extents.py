"""Data ranges of a file (SEEK_DATA), and the blocks that it shares with other files (FIEMAP).

A reflink is believed only if FIEMAP shows shared extents. Otherwise a wrong ioctl number, or a file
system that accepts the call and copies, would be noticed only when the disk is full.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

FS_IOC_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap), linux/fs.h
FIEMAP_FLAG_SYNC = 0x0001
FIEMAP_EXTENT_LAST = 0x0001
FIEMAP_EXTENT_DATA_INLINE = 0x0200
FIEMAP_EXTENT_SHARED = 0x2000

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

_HEADER = struct.Struct("=QQIIII")  # start, length, flags, mapped_extents, extent_count, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_BATCH = 512


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return library


class Occupancy(NamedTuple):
    """Bytes of a file's extents, and how many of them are shared with other files.

    Neither counts inline data.
    """

    mapped_bytes: int
    shared_bytes: int


def occupancy(fd: int) -> Occupancy:
    """Sum up the extents of an open file, as reported by FIEMAP.

    Raises OSError (EOPNOTSUPP, ENOTTY) if the file system has no FIEMAP.
    """
    mapped = shared = start = 0
    request = bytearray(_HEADER.size + _BATCH * _EXTENT.size)
    while True:
        _HEADER.pack_into(request, 0, start, 2**64 - 1 - start, FIEMAP_FLAG_SYNC, 0, _BATCH, 0)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, request, True)
        count = _HEADER.unpack_from(request)[3]
        flags = 0
        for index in range(count):
            logical, _, length, flags = _EXTENT.unpack_from(request, _HEADER.size + index * _EXTENT.size)
            start = logical + length
            if flags & FIEMAP_EXTENT_DATA_INLINE:
                continue
            mapped += length
            if flags & FIEMAP_EXTENT_SHARED:
                shared += length
        if count == 0 or flags & FIEMAP_EXTENT_LAST:
            return Occupancy(mapped, shared)


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each range below `size` that is not a hole, in order.

    Moves the file's seek position. Without SEEK_DATA in the file system, the one range is the whole
    file.
    """
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return
            raise
        if start >= size:
            return
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, offset - start


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free the blocks of a range, which then reads as zeros; the file's size stays.

    Raises OSError, with EOPNOTSUPP if the file system does not support it.
    """
    if _libc().fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
