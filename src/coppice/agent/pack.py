"""Packing, on the host, a tree for a guest. All functions block."""

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

from coppice.linux.extents import data_ranges

if TYPE_CHECKING:
    from _typeshed import SupportsRead

RANGES_MAX = 1024  # data ranges per file that the agent and unpack.py accept
_CHUNK = 1 << 16
_HOLE_MIN = 1 << 16  # smaller holes are sent as zeros


def content_bytes(source: Path) -> int:
    """Return the size of a tree's readable files. A file with several names counts once."""
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
    name: str | None,
    *,
    uid: int = 0,
    gid: int = 0,
    holes: bool = True,
    moved: Callable[[int], None] = lambda _: None,
    wanted: Callable[[tarfile.TarInfo], bool] = lambda _: True,
) -> None:
    """Write a file or tree to `stream` as an archive whose members all lie below `name`, owned by
    `uid` and `gid`.

    :param name: None writes the contents of the directory without the directory itself
    :param holes: leave out the holes of files (GNU tar's sparse format 0.1); otherwise send zeros
    :param moved: called with each number of content bytes written
    :param wanted: returns whether to write a member
    """

    def owned(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not wanted(member):
            return None
        member.uid, member.gid = uid, gid
        member.uname = member.gname = ""
        member.mtime = int(member.mtime)  # a fraction would need an extended header in each member
        return member

    with _Archive.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as archive:
        archive.holes, archive.moved = holes, moved
        for path, member in [(source, name)] if name is not None else [(path, path.name) for path in source.iterdir()]:
            archive.add(path, arcname=member, filter=owned)


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
            # An empty last range marks the end of the file.
            numbers = [number for each in (*ranges, (size, 0)) for number in each]
            tarinfo.pax_headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": ",".join(map(str, numbers))}
        super().addfile(tarinfo, _Contents(fileobj, ranges, self.moved))
        self.moved(size - tarinfo.size)


def _ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """Return offset and length of a file's data ranges.

    If there are too many holes, small ones count as data.
    """
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
    """The data of a file, range after range. Reports how much has been read."""

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
