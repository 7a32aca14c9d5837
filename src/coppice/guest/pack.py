"""Packing on the host what goes into a guest. All functions block."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import SupportsRead

_CHUNK = 1 << 16


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


def pack(stream: BinaryIO, source: Path, name: str, *, uid: int, gid: int, moved: Callable[[int], None]) -> None:
    """Write a file or tree to `stream` as an archive whose members all lie below `name`, owned by `uid` and `gid`.

    :param moved: is called with bytes of contents, as they go
    """

    def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid, member.gid = uid, gid
        member.uname = member.gname = ""
        member.mtime = int(member.mtime)  # else each member would have an extended header for its fraction
        return member

    with _Archive.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as archive:
        archive.moved = moved
        archive.add(source, arcname=name, filter=owned)


class _Archive(tarfile.TarFile):
    moved: Callable[[int], None]

    def addfile(self, tarinfo: tarfile.TarInfo, fileobj: SupportsRead[bytes] | None = None) -> None:
        super().addfile(tarinfo, _Contents(fileobj, self.moved) if fileobj else None)


class _Contents:
    """A file that tells how much of it has been read."""

    def __init__(self, file: SupportsRead[bytes], moved: Callable[[int], None]) -> None:
        self._file = file
        self._moved = moved

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._moved(len(data))
        return data
