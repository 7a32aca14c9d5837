"""Capture of a guest that runs on a private mapping: a clone of the base mem-file, patched with the pages it wrote.

A fork's RAM is its base mem-file plus private pages, so "the RAM is already in its file" would lose what it wrote
since. The guest is paused only for `PrivateCapture.collect`: find the private pages and copy them aside, one after the
other, into memory, and what is more than that may hold into a staging file, which takes several times as long. The base
is cloned before the pause, the pages go to their places after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from coppice.disk.atomic import os_errors, temporary_beside
from coppice.disk.clone import CloneResult, clone_file, nonzero_parts, write_all
from coppice.disk.extents import punch_hole
from coppice.errors import IntegrityError
from coppice.memory.maps import FileIdentity, Vma, identify, process_error, read_maps
from coppice.memory.memfile import check, freeze
from coppice.memory.pagemap import Method, PrivateRange, private_ranges
from coppice.model import MemFile

_BUFFER_BYTES = 4 << 20
_IN_MEMORY_BYTES = 256 << 20  # of one capture, until its pages are in their places
_IOV_MAX = 1024  # limit of process_vm_readv, UIO_MAXIOV

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
)


class CaptureStats(NamedTuple):
    """What one capture of a private mapping found and wrote."""

    dirty_bytes: int  # private pages of the guest
    zero_bytes: int  # of these, pages of zeros: holes in the new mem-file
    written_bytes: int  # written to the new mem-file: the base where it could not be shared, and the other pages
    base: CloneResult
    method: Method


class PrivateCapture:
    """One capture, in the order `prepare`, `collect`, `finish`; a context manager that aborts what is not finished.

    Not for use by two threads at once.
    """

    def __init__(self, base: Path, expected: MemFile, out: Path) -> None:
        self._base_path = base
        self._expected = expected
        self._out = out
        self._temporary = temporary_beside(out)
        self._base: CloneResult | None = None
        self._identity: FileIdentity | None = None
        self._staging: IO[bytes] | None = None
        self._memory: mmap.mmap | None = None  # the first private pages; those after them are in the staging file
        self._ranges: list[PrivateRange] = []
        self._method: Method = "pagemap_scan"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def prepare(self) -> None:
        """Clone the base beside the destination; the guest may run.

        Raises IntegrityError if the base is not what was captured, NoSpace, HostCannot.
        """
        check(self._base_path, self._expected)
        self._identity = identify(self._base_path)
        with os_errors(f"stage private pages beside {self._out}"):
            # A file, not memory: the kernel can write back what does not fit. It has no name, so it cannot leak.
            self._staging = tempfile.TemporaryFile(dir=self._out.parent, buffering=0)  # noqa: SIM115 - closed by abort
        self._base = clone_file(self._base_path, self._temporary, sync=False)

    def collect(self, pid: int) -> int:
        """Copy all private pages of the process aside and return their bytes; the guest must be paused.

        May be called again, for a later instant: it starts over.

        Raises IntegrityError if the process does not map the whole base privately, VmmDied if it ended, NoSpace,
        HostCannot where reading its memory is not permitted.
        """
        identity, staging = self._prepared()
        vmas = guest_ram(pid, identity, self._expected.size_bytes)
        self._ranges, self._method = private_ranges(pid, vmas)
        dirty = sum(found.length for found in self._ranges)
        with os_errors(f"stage private pages beside {self._out}"):
            staging.seek(0)
            staging.truncate()
        self._forget_memory()
        self._memory = _memory(min(dirty, _IN_MEMORY_BYTES))
        position = 0
        with mmap.mmap(-1, _BUFFER_BYTES) as buffer:
            for batch in _batches(self._ranges, len(self._memory)):
                if position < len(self._memory):
                    position += _read_process(pid, batch, self._memory, position)
                    continue
                count = _read_process(pid, batch, buffer, 0)
                with (
                    os_errors(f"stage private pages beside {self._out}"),
                    memoryview(buffer) as view,
                    view[:count] as part,
                ):
                    write_all(staging.fileno(), part, staging.seek(0, os.SEEK_END))
        return dirty

    def finish(self) -> tuple[MemFile, CaptureStats]:
        """Patch the clone, freeze it under its final name, and return it; the guest may run.

        Raises NoSpace or HostCannot.
        """
        self._prepared()
        base = self._base
        if base is None:
            raise RuntimeError("finish() comes after prepare()")
        dirty = written = position = 0
        with os_errors(f"write private pages to {self._out}"):
            fd = os.open(self._temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for found in self._ranges:
                    written += _patch(fd, found, self._staged, position)
                    position += found.length
            finally:
                os.close(fd)
        dirty = position
        mem_file = freeze(self._temporary, self._out)
        self.abort()
        stats = CaptureStats(dirty, dirty - written, base.bytes_written + written, base, self._method)
        return mem_file, stats

    def abort(self) -> None:
        """Remove everything temporary. Idempotent; after `finish` it has nothing to do."""
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._forget_memory()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()
        self._base = None

    def _staged(self, position: int, most: int) -> bytes:
        """Private pages that were put aside, from a position on: `most` bytes, or fewer where memory ends and the file begins."""
        _, staging = self._prepared()
        held = len(self._memory) if self._memory is not None else 0
        if self._memory is not None and position < held:
            return self._memory[position : min(position + most, held)]
        return os.pread(staging.fileno(), most, position - held)

    def _forget_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _prepared(self) -> tuple[FileIdentity, IO[bytes]]:
        if self._identity is None or self._staging is None:
            raise RuntimeError("prepare() comes first, and abort() ends it")
        return self._identity, self._staging


def capture_private(pid: int, base: Path, expected: MemFile, out: Path) -> tuple[MemFile, CaptureStats]:
    """The whole capture of a paused guest in one call; raises what the steps of `PrivateCapture` raise."""
    with PrivateCapture(base, expected, out) as capture:
        capture.prepare()
        capture.collect(pid)
        return capture.finish()


def guest_ram(pid: int, identity: FileIdentity, size_bytes: int) -> list[Vma]:
    """The private mappings of a mem-file in a process, in file order.

    Raises IntegrityError unless they cover the file exactly once: pages outside of them would be lost without a word.
    """
    vmas = sorted((v for v in read_maps(pid) if v.file == identity and v.private), key=lambda vma: vma.offset)
    covered = 0
    for vma in vmas:
        if vma.offset != covered:
            break
        covered += vma.length
    if covered != size_bytes or covered != sum(vma.length for vma in vmas):
        raise IntegrityError(
            f"Process {pid} maps {covered} of {size_bytes} bytes of its mem-file privately",
            hint="keep its disk with `coppice snapshot create NAME --kind stopped`, or stop it",
        )
    return vmas


def _memory(size: int) -> mmap.mmap:
    """Memory for so many bytes, in huge pages where the kernel has some: each page that is new would be a fault within the pause."""
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _batches(ranges: list[PrivateRange], border: int) -> Iterator[list[tuple[int, int]]]:
    """Cut the ranges into batches of (address, length) that one process_vm_readv can read into the buffer; none reaches over the border."""
    batch: list[tuple[int, int]] = []
    done = 0
    room = min(_BUFFER_BYTES, border)
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
                batch, room = [], min(_BUFFER_BYTES, border - done) if done < border else _BUFFER_BYTES
    if batch:
        yield batch


def _read_process(pid: int, batch: list[tuple[int, int]], buffer: mmap.mmap, position: int) -> int:
    """Read the memory of a batch, one piece after the other, into the buffer from `position` on; returns the bytes."""
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
            hint="see `coppice logs --vmm NAME`, and what `coppice verify` says of the mem-file",
        )
    return count


def _patch(fd: int, found: PrivateRange, staged: Callable[[int, int], bytes], position: int) -> int:
    """Write one range from where it was put aside to its place, zeros as holes; returns the bytes written."""
    done = written = 0
    while done < found.length:
        chunk = staged(position + done, min(_BUFFER_BYTES, found.length - done))
        if not chunk:
            raise OSError(errno.EIO, "the staging file ended early")
        target = found.offset + done
        end = 0
        for offset, part in nonzero_parts(chunk):
            _write_zeros(fd, target + end, offset - end)
            write_all(fd, part, target + offset)
            written += len(part)
            end = offset + len(part)
        _write_zeros(fd, target + end, len(chunk) - end)
        done += len(chunk)
    return written


def _write_zeros(fd: int, offset: int, length: int) -> None:
    if length == 0:
        return
    try:
        punch_hole(fd, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        write_all(fd, bytes(length), offset)
