"""Capture of a guest that runs on a private mapping: what it wrote since its memory was captured.

A fork's RAM is its captured memory plus its private pages, so the files alone lack everything
written since. The guest is paused only for `PrivateCapture.collect`, which finds the private pages
and copies them into memory, one after the other. Pages beyond a limit go into a staging file, which
takes several times as long. Everything else is done before or after the pause.

The pages become a new layer over the memory that the guest was restored from (see
`coppice.memory.layers`). If there would be too many layers, the new one takes in the others. If the
layers would be too large, if their map would be too long, or if the VMM cannot map layers, the
capture is a whole mem-file: a clone of the base, patched with everything that lies over it.
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
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from coppice.errors import IntegrityError
from coppice.linux.clone import CloneResult, clone_file, write_all
from coppice.linux.files import os_errors, temporary_beside
from coppice.linux.maps import FileIdentity, Part, Vma, identify, private_parts, process_error, read_text, spans_of
from coppice.linux.pagemap import Method, PrivateRange, private_ranges
from coppice.memory import layers
from coppice.memory.layers import BUFFER_BYTES, Extent, Kind, Memory, Plan, patch
from coppice.memory.memfile import check, freeze
from coppice.model import MemFile, MemLayer

_IN_MEMORY_BYTES = 256 << 20  # per capture, until its pages are written to the new file
_IOV_MAX = 1024  # limit of process_vm_readv, UIO_MAXIOV

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
)


class CaptureStats(NamedTuple):
    """What one capture of a private mapping found and wrote."""

    dirty_bytes: int  # private pages of the guest
    zero_bytes: int  # of the private pages, those of zeros: holes in the new file
    written_bytes: int  # bytes written to the new file: the other pages, and what was copied from older files
    base: CloneResult | None  # the clone of the base, for a whole mem-file
    kind: Kind
    method: Method


class Taken(NamedTuple):
    """A captured memory. One of its files is new: the topmost layer, or the mem-file if there is none."""

    mem_file: MemFile
    layers: tuple[MemLayer, ...]
    stats: CaptureStats


class PrivateCapture:
    """One capture, in the order `prepare`, `collect`, `finish`; a context manager that aborts an
    unfinished one.

    Not for use by two threads at once.
    """

    def __init__(
        self, base: Path, expected: MemFile, out: Path, below: Sequence[MemLayer] = (), *, layered: bool = False
    ) -> None:
        """Make a capture of a guest that was restored from the mem-file `base` with the layers `below`.

        :param out: where the new file is made
        :param layered: whether the VMM can map layers
        """
        self._base_path = base
        self._expected = expected
        self._out = out
        self._below = tuple(below)
        self._layered = layered
        self._temporary = temporary_beside(out)
        self._base: CloneResult | None = None
        self._map: list[Extent] = []
        self._identities: list[FileIdentity] = []
        self._offsets: dict[FileIdentity, list[tuple[int, int]]] = {}  # position and offset of each extent, by file
        self._staging: IO[bytes] | None = None
        self._memory: mmap.mmap | None = None  # the first private pages; the rest is in the staging file
        self._ranges: list[PrivateRange] = []
        self._method: Method = "pagemap_scan"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def prepare(self) -> None:
        """Check the captured memory; clone its base if a whole mem-file is wanted. The guest may run.

        Raises IntegrityError if a file has changed since its capture, NoSpace, HostCannot.
        """
        paths = [self._base_path, *(layers.path_of(self._base_path, number + 1) for number in range(len(self._below)))]
        for path, expected in zip(paths, (self._expected, *self._below), strict=True):
            check(path, expected)
        self._identities = [identify(path) for path in paths]
        self._map = layers.map_of(self._base_path, self._below)
        self._offsets = {identity: [] for identity in self._identities}
        for extent in sorted(self._map, key=lambda extent: extent.position):
            self._offsets[self._identities[extent.layer]].append((extent.position, extent.offset))
        with os_errors(f"stage private pages for {self._out}"):
            # A file lets the kernel write back pages that do not fit in memory. It has no name, so
            # it cannot be left behind.
            self._staging = tempfile.TemporaryFile(dir=self._out.parent, buffering=0)  # noqa: SIM115 - closed by abort
        if not self._layered:
            self._base = clone_file(self._base_path, self._temporary, sync=False)

    def collect(self, pid: int) -> int:
        """Copy all private pages of the process aside and return their bytes; the guest must be
        paused.

        Calling it again, at a later time, starts over.

        Raises IntegrityError if the process does not map the whole memory privately, VmmDied if it
        ended, NoSpace, HostCannot if reading its memory is not permitted.
        """
        staging = self._prepared()
        parts = private_parts(read_text(pid, "maps"), self._identities)
        self._require_layers(pid, parts)
        vmas = guest_ram(pid, spans_of(parts, self._offset_of), self._expected.size_bytes)
        self._ranges, self._method = private_ranges(pid, vmas)
        dirty = sum(found.length for found in self._ranges)
        with os_errors(f"stage private pages for {self._out}"):
            staging.seek(0)
            staging.truncate()
        self._forget_memory()
        self._memory = _memory(min(dirty, _IN_MEMORY_BYTES))
        position = 0
        with mmap.mmap(-1, BUFFER_BYTES) as buffer:
            for batch in _batches(self._ranges, len(self._memory)):
                if position < len(self._memory):
                    position += _read_process(pid, batch, self._memory, position)
                    continue
                count = _read_process(pid, batch, buffer, 0)
                with (
                    os_errors(f"stage private pages for {self._out}"),
                    memoryview(buffer) as view,
                    view[:count] as part,
                ):
                    write_all(staging.fileno(), part, staging.seek(0, os.SEEK_END))
        return dirty

    def finish(self) -> Taken:
        """Write the new file, freeze it as `out`, and return the captured memory. The guest may run.

        Raises NoSpace or HostCannot.
        """
        self._prepared()
        size = self._expected.size_bytes
        plan = layers.plan(self._map, self._below, self._ranges, size, layered=self._layered)
        with os_errors(f"write the captured memory to {self._out}"):
            if plan.kind == "whole" and self._base is None:
                self._base = clone_file(self._base_path, self._temporary, sync=False)
            fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                written = plan.begin(fd) if plan.kind != "whole" else 0
                written += self._copy(fd, plan)
                zeros = position = 0
                for found in self._ranges:
                    target = plan.position(found.offset)
                    put = patch(fd, target, found.length, partial(self._staged, position))
                    position += found.length
                    zeros += found.length - put
                    written += put
            finally:
                os.close(fd)
        fresh = freeze(self._temporary, self._out)
        base = self._base
        self.abort()
        stats = CaptureStats(
            position, zeros, written + (base.bytes_written if base else 0), base, plan.kind, self._method
        )
        if plan.kind == "whole":
            return Taken(fresh, (), stats)
        below = self._below if plan.kind == "layer" else ()
        return Taken(self._expected, (*below, plan.record(fresh)), stats)

    def _copy(self, fd: int, plan: Plan) -> int:
        """Copy what the new file has of the memory below; return the bytes written."""
        if not plan.copied:
            return 0
        with Memory(self._base_path, self._map, len(self._below)) as memory:
            return sum(
                patch(fd, plan.position(each.offset), each.length, partial(memory.read, each.offset))
                for each in plan.copied
            )

    def abort(self) -> None:
        """Remove everything temporary. Idempotent; does nothing after `finish`."""
        if self._staging is not None:
            self._staging.close()
            self._staging = None
        self._forget_memory()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()
        self._base = None

    def _offset_of(self, part: Part) -> int:
        """Return the offset in guest RAM of a mapping: a VMM may map an extent in several pieces."""
        if part.file == self._identities[0]:
            return part.offset
        extents = self._offsets[part.file]
        position, offset = extents[max(bisect_right(extents, (part.offset, 1 << 63)) - 1, 0)]
        return offset + part.offset - position

    def _require_layers(self, pid: int, parts: Sequence[Part]) -> None:
        """Refuse a process that maps the files of the memory, but not each where it belongs."""
        mapped = Counter[FileIdentity]()
        for part in parts:
            mapped[part.file] += part.end - part.start
        expected = Counter[FileIdentity]()
        for extent in self._map:
            expected[self._identities[extent.layer]] += extent.length
        if any(mapped[layer] != expected[layer] for layer in self._identities[1:]):
            raise IntegrityError(
                f"Process {pid} does not map the layers of its memory as they were captured",
                hint="keep its disk with `coppice snapshot create NAME --kind stopped`, or stop it",
            )

    def _staged(self, start: int, position: int, most: int) -> bytes:
        """Return staged private pages from `start` and a position on: up to `most` bytes, fewer at
        the border between memory and file.
        """
        staging = self._prepared()
        position += start
        held = len(self._memory) if self._memory is not None else 0
        if self._memory is not None and position < held:
            return self._memory[position : min(position + most, held)]
        return os.pread(staging.fileno(), most, position - held)

    def _forget_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _prepared(self) -> IO[bytes]:
        if self._staging is None:
            raise RuntimeError("prepare() comes first, and abort() ends it")
        return self._staging


def guest_ram(pid: int, spans: Sequence[Vma], size_bytes: int) -> list[Vma]:
    """Return the private mappings of a memory in a process, in file order.

    Raises IntegrityError unless they cover the file exactly once: pages elsewhere would be lost
    silently.
    """
    vmas = sorted(spans, key=lambda vma: vma.offset)
    covered = 0
    for vma in vmas:
        if vma.offset != covered:
            break
        covered += vma.length
    if covered != size_bytes or covered != sum(vma.length for vma in vmas):
        raise IntegrityError(
            f"Process {pid} maps {covered} of {size_bytes} bytes of its mem-file privately",
            hint="keep its disk with `coppice snapshot create NAME --kind stopped`, or run `coppice stop NAME`",
        )
    return vmas


def _memory(size: int) -> mmap.mmap:
    """Return memory of this size, in huge pages if available: each new page costs a fault during
    the pause.
    """
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _batches(ranges: list[PrivateRange], border: int) -> Iterator[list[tuple[int, int]]]:
    """Split the ranges into batches of (address, length), each for one process_vm_readv.

    None crosses the border of the buffer.
    """
    batch: list[tuple[int, int]] = []
    done = 0
    room = min(BUFFER_BYTES, border)
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
