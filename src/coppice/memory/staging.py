"""Copies of pages of another process, which are taken at one or more moments.

Pages beyond a limit go into a file, which takes several times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from coppice.errors import IntegrityError
from coppice.linux.clone import write_all
from coppice.linux.files import os_errors
from coppice.linux.maps import process_error
from coppice.linux.pagemap import PrivateRange
from coppice.memory.layers import BUFFER_BYTES, Extent, covered

_IN_MEMORY_BYTES = 256 << 20  # per capture, until its pages are written to the new file
_KEPT_SHARE = 4  # one part in so many of the memory is kept for the pages that are taken last
_IOV_MAX = 1024  # limit of process_vm_readv, UIO_MAXIOV

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
)


class _Part(NamedTuple):
    """The pages of one moment, one after the other: the first ones in memory, the others in the file."""

    ranges: Sequence[PrivateRange]
    memory: mmap.mmap
    held: int  # bytes of the pages that are in memory
    position: int  # of the others in the file


class Staging:
    """The copies. Not for use by two threads at once."""

    def __init__(self, out: Path) -> None:
        """Make a place for pages of a process that will be part of the file `out`.

        Raises NoSpace or HostCannot.
        """
        self._out = out
        self._parts: list[_Part] = []
        self._map: list[Extent] = []  # the layer of an extent is the number of its part, from 1
        self._mapped = 0
        with os_errors(f"stage private pages for {out}"):
            # A file lets the kernel write back pages that do not fit in memory. It has no name, so
            # it cannot be left behind.
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=out.parent, buffering=0)  # noqa: SIM115 - closed by close

    def take(self, pid: int, ranges: Sequence[PrivateRange], *, last: bool = True) -> None:
        """Copy pages. They are over those that were taken before.

        :param last: no more pages will be taken, or only by `forget` and another `take`

        Raises VmmDied, NoSpace, HostCannot if reading the memory of the process is not permitted.
        """
        total = sum(found.length for found in ranges)
        most = _IN_MEMORY_BYTES - (0 if last else _IN_MEMORY_BYTES // _KEPT_SHARE)
        held = max(min(total, most - sum(part.held for part in self._parts)), 0)
        with os_errors(f"stage private pages for {self._out}"):
            end = self._file.seek(0, os.SEEK_END)
        self._parts.append(_Part(ranges, _memory(held), held, end))
        memory, position = self._parts[-1].memory, 0
        with mmap.mmap(-1, BUFFER_BYTES) as buffer:
            for batch in _batches(ranges, held):
                if position < held:
                    position += _read_process(pid, batch, memory, position)
                    continue
                count = _read_process(pid, batch, buffer, 0)
                with (
                    os_errors(f"stage private pages for {self._out}"),
                    memoryview(buffer) as view,
                    view[:count] as part,
                ):
                    write_all(self._file.fileno(), part, end)
                end += count

    def read(self, start: int, position: int, most: int) -> bytes:
        """Return bytes of the latest copies, from `start` and a position of the guest's memory on: up to
        `most`, or b"" for a page that was not taken.
        """
        while self._mapped < len(self._parts):
            self._mapped += 1
            self._map = covered(self._map, list(_extents(self._parts[self._mapped - 1].ranges, self._mapped)))
        offset = start + position
        at = bisect_right(self._map, (offset, 1 << 63))
        if not at or self._map[at - 1].end <= offset:
            return b""
        extent = self._map[at - 1].part(offset, self._map[at - 1].end)
        part, most = self._parts[extent.layer - 1], min(most, extent.length)
        if extent.position < part.held:
            return part.memory[extent.position : min(extent.position + most, part.held)]
        return os.pread(self._file.fileno(), most, part.position + extent.position - part.held)

    def forget(self) -> None:
        """Remove all copies.

        Raises HostCannot.
        """
        self._drop()
        with os_errors(f"stage private pages for {self._out}"):
            self._file.truncate(0)

    def close(self) -> None:
        """Remove everything. Idempotent."""
        self._drop()
        self._file.close()

    def _drop(self) -> None:
        while self._parts:
            self._parts.pop().memory.close()
        self._map, self._mapped = [], 0


def _extents(ranges: Sequence[PrivateRange], number: int) -> Iterator[Extent]:
    position = 0
    for offset, _, length in ranges:
        yield Extent(offset, length, number, position)
        position += length


def _memory(size: int) -> mmap.mmap:
    """Return memory of this size, in huge pages if available: each new page costs a fault during
    the pause.
    """
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _batches(ranges: Sequence[PrivateRange], border: int) -> Iterator[list[tuple[int, int]]]:
    """Split the ranges into batches of (address, length), each for one process_vm_readv.

    None crosses the border of the buffer.
    """
    batch: list[tuple[int, int]] = []
    done = 0
    room = min(BUFFER_BYTES, border) or BUFFER_BYTES
    for _, address, length in ranges:
        while length:
            take = min(length, room)
            batch.append((address, take))
            address += take
            length -= take
            room -= take
            done += take
            if room == 0 or len(batch) == _IOV_MAX:
                yield batch
                batch, room = [], min(BUFFER_BYTES, border - done) if done < border else BUFFER_BYTES
    if batch:
        yield batch


def _read_process(pid: int, batch: list[tuple[int, int]], buffer: mmap.mmap, position: int) -> int:
    """Read the memory of a batch, one piece after the other, into the buffer from `position` on;
    return the bytes read.
    """
    wanted = sum(length for _, length in batch)
    remote = ctypes.create_string_buffer(struct.pack(f"{2 * len(batch)}Q", *itertools.chain.from_iterable(batch)))
    anchor = ctypes.c_char.from_buffer(buffer)
    local = ctypes.create_string_buffer(struct.pack("2Q", ctypes.addressof(anchor) + position, wanted))
    count: int = _libc.process_vm_readv(pid, local, 1, remote, len(batch), 0)
    code = ctypes.get_errno()
    del anchor  # else the buffer could not be closed
    if count < 0:
        raise process_error(pid, f"read the memory of process {pid}", OSError(code, os.strerror(code)))
    if count != wanted:
        raise IntegrityError(
            f"Only {count} of {wanted} bytes of the guest's private pages could be read",
            hint="see `coppice logs --vmm NAME`, and check the mem-file with `coppice verify`",
        )
    return count
