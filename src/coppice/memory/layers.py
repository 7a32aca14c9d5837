"""Layers: the pages in which a captured memory differs from its base mem-file.

A layer is a file of three parts: a page of its own, the pages of memory one after the other, and a
map of all the memory that does not come from the base: (offset in memory, length, number of the
layer, position in that layer's file), in order of offset. A hole among the pages is memory of
zeros.

The pages are packed, not at their offsets in memory: the kernel's read-around of a mapped file
then reads pages of the layer, and not holes, which would become pages of zeros in the page cache.

The map of the topmost layer covers the layers below it, so a restore reads that one alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from coppice.errors import IntegrityError
from coppice.linux.clone import clone_file, nonzero_parts, open_source, write_all
from coppice.linux.extents import punch_hole
from coppice.linux.files import os_errors, temporary_beside
from coppice.linux.pagemap import PrivateRange
from coppice.memory.memfile import freeze
from coppice.model import PAGE_SIZE, MemFile, MemLayer, Sharing

if TYPE_CHECKING:
    from coppice.linux.remap import Layer

MOST = 8
"""Layers over one base, at most. A capture of a machine with so many merges them into one."""

MOST_EXTENTS = 4096
"""Extents of one map, at most: a restored machine has up to twice as many mappings. The kernel allows 65530 (vm.max_map_count)."""

LARGEST_SHARE = 2
"""The layers over a base together have at most one part in so many of the guest's memory."""

Kind = Literal["layer", "merged", "whole"]
"""What a capture makes: a layer over the others, one layer in place of all, or a mem-file."""

BUFFER_BYTES = 4 << 20
_HEADER = b"Coppice memory layer 1\n".ljust(PAGE_SIZE, b"\0")
_EXTENT = struct.Struct("<4Q")
_SLACK = 8  # a layer may have one page for so many written ones that the guest did not write, to shorten its map


class Extent(NamedTuple):
    """A range of the guest's memory, and where it is: in which layer, from 1, and at which position of its file."""

    offset: int
    length: int
    layer: int
    position: int = 0

    @property
    def end(self) -> int:
        """Where the next byte is."""
        return self.offset + self.length

    def part(self, offset: int, end: int) -> Extent:
        """Return a part of it."""
        return Extent(offset, end - offset, self.layer, self.position + offset - self.offset)


def path_of(base: Path, number: int) -> Path:
    """Return the path of a layer, from 1, in the directory of its base."""
    return base.with_name(f"{base.name}.{number}")


def read_map(path: Path, layer: MemLayer) -> list[Extent]:
    """Read the map of a layer, and compare it with its record.

    :raises IntegrityError: the map is missing or was changed
    """
    size = layer.extents * _EXTENT.size
    with os_errors(f"read the map of {path}"), open_source(path) as fd:
        text = os.pread(fd, size, layer.size_bytes - size)
    if hashlib.sha256(text).hexdigest() != layer.map_sha256:
        raise IntegrityError(
            f"The map of the memory layer {path} is not what was captured",
            hint="remove this instance, and fork again from a source that `coppice verify` finds intact",
        )
    return [Extent(*fields) for fields in _EXTENT.iter_unpack(text)]


def map_of(base: Path, layers: Sequence[MemLayer]) -> list[Extent]:
    """Return the map of a captured memory; empty if the memory has no layers. Raises as `read_map` does."""
    return read_map(path_of(base, len(layers)), layers[-1]) if layers else []


def ranges_over(base: Path, layers: Sequence[MemLayer]) -> tuple[Layer, ...]:
    """Return what a VMM maps over the base. Raises as `read_map` does."""
    from coppice.linux.remap import Layer  # takes long, and most memory has no layers

    names = [path_of(base, number).name for number in range(1, len(layers) + 1)]
    return tuple(
        Layer(names[number - 1], offset, length, position) for offset, length, number, position in map_of(base, layers)
    )


def check_foreign_map(base: Path, layers: Sequence[MemLayer], size_bytes: int) -> None:
    """Refuse a map that no capture of a memory of this size has made. The map of another host is not trustworthy.

    :raises IntegrityError: it names memory or positions that do not exist
    """
    end = 0
    for extent in map_of(base, layers):
        last = layers[extent.layer - 1].size_bytes if 0 < extent.layer <= len(layers) else 0
        aligned = not any(number % PAGE_SIZE for number in (extent.offset, extent.length, extent.position))
        inside = end <= extent.offset and extent.end <= size_bytes and extent.position >= PAGE_SIZE
        if not (aligned and inside and extent.length and extent.position + extent.length <= last):
            raise IntegrityError(
                f"The map of the memory layers of {base} is not valid", hint="do not trust their source"
            )
        end = extent.end


def covered(below: Sequence[Extent], above: Sequence[Extent]) -> list[Extent]:
    """Return a map with another one over it. Both are in order, and neither overlaps itself."""
    result = list(above)
    at = 0
    for extent in below:
        offset = extent.offset
        while at < len(above) and above[at].end <= offset:
            at += 1
        over = at
        while over < len(above) and above[over].offset < extent.end:
            if offset < above[over].offset:
                result.append(extent.part(offset, above[over].offset))
            offset = max(offset, above[over].end)
            over += 1
        if offset < extent.end:
            result.append(extent.part(offset, extent.end))
    return sorted(result)


class Plan(NamedTuple):
    """The contents of a new capture's file besides the pages that the guest wrote."""

    kind: Kind
    copied: list[Extent]  # of the memory below
    own: list[Extent]  # what the new layer has; empty for a whole mem-file, which has everything at its offset
    extents: list[Extent]  # the map

    @property
    def data_bytes(self) -> int:
        """The guest's memory in the new layer."""
        return sum(extent.length for extent in self.own)

    @property
    def text(self) -> bytes:
        """The map as it is in the file."""
        return b"".join(_EXTENT.pack(*extent) for extent in self.extents)

    def begin(self, fd: int) -> int:
        """Write everything but pages to the new, empty file of a layer; return the bytes written."""
        text, end = self.text, len(_HEADER) + self.data_bytes
        os.ftruncate(fd, end + len(text))
        write_all(fd, _HEADER, 0)
        write_all(fd, text, end)
        return len(_HEADER) + len(text)

    def position(self, offset: int) -> int:
        """Return where a page of memory belongs in the new file."""
        if self.kind == "whole":
            return offset
        extent = self.own[bisect_right(self.own, (offset, 1 << 63)) - 1]
        return extent.position + offset - extent.offset

    def record(self, fresh: MemFile) -> MemLayer:
        """Return the record of the new layer."""
        return MemLayer(
            **msgspec.structs.asdict(fresh),
            data_bytes=self.data_bytes,
            extents=len(self.extents),
            map_sha256=hashlib.sha256(self.text).hexdigest(),
        )


def plan(
    below: Sequence[Extent],
    layers: Sequence[MemLayer],
    dirty: Sequence[PrivateRange],
    size_bytes: int,
    *,
    layered: bool,
) -> Plan:
    """Decide what a capture makes of the pages that a guest wrote over a memory with `layers` and their map `below`.

    :param dirty: the written pages, in order
    :param size_bytes: of the guest's memory
    :param layered: whether the VMM can map layers
    """
    number = len(layers) + 1
    written = [Extent(found.offset, found.length, number) for found in dirty]
    slack = sum(extent.length for extent in written) // _SLACK
    own = _packed(joined(written, slack=slack, most=MOST_EXTENTS // 4), number)
    extents = covered(below, own)
    own_bytes = sum(extent.length for extent in own)
    all_bytes = own_bytes + sum(layer.data_bytes for layer in layers)
    if not layered or len(extents) > MOST_EXTENTS or all_bytes * LARGEST_SHARE > size_bytes:
        return Plan("whole", [extent for extent in covered(below, written) if extent.layer < number], [], [])
    gaps = [extent for extent in covered(own, [extent._replace(layer=0) for extent in written]) if extent.layer]
    if number <= MOST:
        return Plan("layer", gaps, own, extents)
    older = [extent for extent in extents if extent.layer < number]
    one = _packed(joined(extents, slack=0, most=len(extents)), 1)
    return Plan("merged", [*gaps, *older], one, one)


def _packed(ranges: Iterable[tuple[int, int]], layer: int) -> list[Extent]:
    """Give ranges of memory their positions in the file of a new layer, one after the other."""
    extents, position = list[Extent](), len(_HEADER)
    for offset, length in ranges:
        extents.append(Extent(offset, length, layer, position))
        position += length
    return extents


class Memory:
    """The files of one captured memory, open for reading; a context manager."""

    def __init__(self, base: Path, extents: Sequence[Extent], count: int) -> None:
        """`extents` is the map of the memory, which has `count` layers."""
        self._extents = extents
        self._starts = [extent.offset for extent in extents]
        self._descriptors: list[int] = []
        with os_errors(f"open the memory {base}"):
            try:
                for path in (base, *(path_of(base, number) for number in range(1, count + 1))):
                    self._descriptors.append(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def read(self, start: int, position: int, most: int) -> bytes:
        """Return bytes of the memory from `start` and a position on: at least one, and not more than `most`.

        :raises OSError: a file cannot be read
        """
        offset = start + position
        at = bisect_right(self._starts, offset)
        extent = self._extents[at - 1] if at else None
        if extent is not None and offset < extent.end:
            rest = extent.part(offset, extent.end)
            return os.pread(self._descriptors[rest.layer], min(most, rest.length), rest.position)
        if at < len(self._starts):
            most = min(most, self._starts[at] - offset)
        return os.pread(self._descriptors[0], most, offset)


def joined(ranges: Sequence[Extent], *, slack: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of ranges joined over small gaps: each is a mapping of every later restore.

    The smallest gaps are closed first: up to `slack` bytes of them, and more if there are more than `most` ranges.
    """
    gaps = sorted(after.offset - before.end for before, after in pairwise(ranges))
    closed = 0
    for gap in gaps:
        slack -= gap
        if slack < 0 and len(ranges) - closed <= most:
            break
        closed += 1
    largest = gaps[closed - 1] if closed else -1
    of_largest = closed - bisect_left(gaps, largest)
    start = end = -1
    for offset, length, *_ in ranges:
        gap = offset - end
        if end >= 0 and gap == largest:
            of_largest -= 1
        if end < 0 or gap > largest or (gap == largest and of_largest < 0):
            if end >= 0:
                yield start, end - start
            start = offset
        end = offset + length
    if end >= 0:
        yield start, end - start


def flatten(base: Path, layers: Sequence[MemLayer], destination: Path, *, reason: str) -> tuple[MemFile, int]:
    """Write a memory with layers as one mem-file of its own; also return the bytes written.

    For a VMM that cannot map layers. The caller has checked the files.

    :raises IntegrityError: a file of the memory is missing, or its map was changed
    :raises NoSpace: the disk is full
    """
    extents = map_of(base, layers)
    temporary = temporary_beside(destination)
    try:
        written = clone_file(base, temporary, sync=False).bytes_written
        with Memory(base, extents, len(layers)) as memory, os_errors(f"write the memory {destination}"):
            fd = os.open(temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                written += sum(
                    patch(fd, each.offset, each.length, partial(memory.read, each.offset)) for each in extents
                )
            finally:
                os.close(fd)
        fresh = freeze(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
    return msgspec.structs.replace(fresh, sharing=Sharing.COPY, reason=reason), written


def patch(fd: int, target: int, length: int, read: Callable[[int, int], bytes]) -> int:
    """Write what `read` has to a range of the new file, zeros as holes; return the bytes written.

    :param read: returns bytes from a position of the range on, not more than so many
    """
    done = written = 0
    while done < length:
        chunk = read(done, min(BUFFER_BYTES, length - done))
        if not chunk:
            raise OSError(errno.EIO, "a file of the memory ended early")
        end = done
        for offset, part in nonzero_parts(chunk):
            _write_zeros(fd, target + end, done + offset - end)
            write_all(fd, part, target + done + offset)
            written += len(part)
            end = done + offset + len(part)
        done += len(chunk)
        _write_zeros(fd, target + end, done - end)
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
