"""Packing on the host what goes into a guest. All functions block."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from coppice.disk.extents import data_ranges

if TYPE_CHECKING:
    from _typeshed import SupportsRead

RANGES_MAX = 1024  # what the agent takes of one file, and unpack.py of the agent
_CHUNK = 1 << 16
_HOLE_MIN = 1 << 16  # smaller ones are sent as zeros


def content_bytes(source: Path) -> int:
    """What the files of a tree hold, those with several names once. Of what cannot be looked at nothing is counted."""
    inside = () if source.is_symlink() else os.walk(source)
    below = (f"{directory}/{name}" for directory, _, names in inside for name in names)
    sizes: dict[tuple[int, int], int] = {}
    for path in itertools.chain([str(source)], below):
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def pack(
    stream: BinaryIO,
    source: Path,
    name: str,
    *,
    uid: int = 0,
    gid: int = 0,
    holes: bool = True,
    moved: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a file or tree to `stream` as an archive whose members all lie below `name`, owned by `uid` and `gid`.

    :param holes: leave out the holes of files and say where they are, in GNU tar's sparse format 0.1; else they are zeros
    :param moved: is called with bytes of contents, as they go
    """

    def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid, member.gid = uid, gid
        member.uname = member.gname = ""
        member.mtime = int(member.mtime)  # else each member would have an extended header for its fraction
        return member

    with _Archive.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as archive:
        archive.holes, archive.moved = holes, moved
        archive.add(source, arcname=name, filter=owned)


class _Archive(tarfile.TarFile):
    holes: bool
    moved: Callable[[int], None]

    def addfile(self, tarinfo: tarfile.TarInfo, fileobj: SupportsRead[bytes] | None = None) -> None:
        if not isinstance(fileobj, io.BufferedReader):
            super().addfile(tarinfo)
            return
        size = tarinfo.size
        ranges = _ranges(fileobj.fileno(), size) if self.holes else [(0, size)]
        tarinfo.size = sum(length for _, length in ranges)
        if tarinfo.size < size:
            # The last range is empty and ends the file.
            numbers = [number for each in (*ranges, (size, 0)) for number in each]
            tarinfo.pax_headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": ",".join(map(str, numbers))}
        super().addfile(tarinfo, _Contents(fileobj, ranges, self.moved))
        self.moved(size - tarinfo.size)


def _ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """Offset and length of what is data in a file, without its smaller holes: as many as make for no more ranges than there may be."""
    least = _HOLE_MIN
    while True:
        ranges: list[tuple[int, int]] = []
        for offset, length in data_ranges(fd, size):
            if ranges and offset - sum(ranges[-1]) < least:
                ranges[-1] = ranges[-1][0], offset + length - ranges[-1][0]
            else:
                ranges.append((offset, length))
        if len(ranges) < RANGES_MAX:
            return ranges
        least *= 4


class _Contents:
    """The data of a file, range after range; it tells how much of it has been read."""

    def __init__(self, file: io.BufferedReader, ranges: list[tuple[int, int]], moved: Callable[[int], None]) -> None:
        self._file = file
        self._ranges = ranges
        self._moved = moved

    def read(self, size: int = -1, /) -> bytes:
        data = bytearray()
        while len(data) < size and self._ranges:
            offset, left = self._ranges[0]
            got = os.pread(self._file.fileno(), min(size - len(data), left), offset)
            data += got
            self._ranges[:1] = [(offset + len(got), left - len(got))] if 0 < len(got) < left else []
        self._moved(len(data))
        return bytes(data)
