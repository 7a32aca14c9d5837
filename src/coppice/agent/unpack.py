"""Unpacking, on the host, an archive from a guest. All functions block.

The guest is hostile. Nothing is written through a link or outside the destination, no device is
made, and memory use is bounded. (The standard library's reader reads as much at once as a header
claims, and resolves links by name.)
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from coppice.agent.pack import RANGES_MAX
from coppice.errors import GuestProtocolError, NoSpace, UnsafePath

_BLOCK = 512
_CHUNK = 1 << 16
_PAX_MAX = 1 << 16
_DEPTH_MAX = 256
_RECORD = re.compile(rb"(\d{1,6}) ([^=]{1,64})=")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


_Range = tuple[int, int]  # offset and length


class Budget:
    """The limit of bytes to write (None: no limit), and the callback `moved` for those received."""

    def __init__(self, limit: int | None, moved: Callable[[int], None]) -> None:
        self._limit = limit
        self.moved = moved
        self.used = 0

    def spend(self, size: int) -> None:
        """Account for `size` bytes.

        :raises NoSpace: the limit is exceeded
        """
        self.used += size
        if self._limit is not None and self.used > self._limit:
            raise NoSpace(f"the guest sends more than {self._limit} bytes", hint="raise the limit, or copy less")


def unpack(
    stream: BinaryIO,
    parent: Path,
    name: str | None,
    *,
    max_bytes: int | None = None,
    moved: Callable[[int], None] = lambda _: None,
) -> int:
    """Unpack an archive that has one top directory or file, as `parent`/`name`.

    Without a name, the contents of the top directory go into `parent`, whose mode is kept. Owners,
    set-id bits and write permission for group and others are not restored.

    :param moved: called with each number of content bytes received
    :return: the bytes of contents
    :raises UnsafePath: a member is outside the destination, or not a file, directory or link
    :raises GuestProtocolError: the stream is not an archive, or is cut off
    :raises NoSpace: the contents exceed `max_bytes`
    """
    budget = Budget(max_bytes, moved)
    root = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for member, ranges in _members(stream):
            place = _Place(root, name, _parts(member.name))
            if not (parts := place.renamed(place.parts)):
                if not member.isdir():
                    raise UnsafePath(f"the guest sends {member.name[:200]!r}, which is not a directory", hint=_HINT)
                continue
            with _parent(root, parts) as (directory, base):
                _make(_Contents(stream, ranges, budget), directory, base, member, place)
    finally:
        os.close(root)
    return budget.used


class _Contents(NamedTuple):
    """The current member's data: the stream, and the ranges of the file that follow in it."""

    stream: BinaryIO
    ranges: list[_Range]
    budget: Budget


class _Place(NamedTuple):
    root: int
    name: str | None  # replaces the archive's first path component; None removes it
    parts: list[str]

    def renamed(self, parts: list[str]) -> list[str]:
        """Return the path below `root` of a member of the archive."""
        return parts[1:] if self.name is None else [self.name, *parts[1:]]


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or not parts or ".." in parts or "\0" in name or len(parts) > _DEPTH_MAX:
        raise UnsafePath(f"the guest sends {name[:200]!r}, which is outside the destination", hint=_HINT)
    return parts


_HINT = "exclude it, or get the unchanged tree with `coppice exec NAME -- tar c PATH`"


@contextlib.contextmanager
def _parent(root: int, parts: list[str]) -> Iterator[tuple[int, str]]:
    """Open the directory of the last part, following no links and making missing directories."""
    directory = os.dup(root)
    try:
        for part in parts[:-1]:
            try:
                inner = os.open(part, _DIRECTORY, dir_fd=directory)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=directory)
                inner = os.open(part, _DIRECTORY, dir_fd=directory)
            except OSError as error:
                raise UnsafePath(f"the guest sends {'/'.join(parts)!r} through a link", hint=_HINT) from error
            os.close(directory)
            directory = inner
        yield directory, parts[-1]
    finally:
        os.close(directory)


def _make(contents: _Contents, directory: int, base: str, member: tarfile.TarInfo, place: _Place) -> None:
    if member.isdir():
        with contextlib.suppress(FileExistsError):
            os.mkdir(base, dir_fd=directory)
        inner = os.open(base, _DIRECTORY, dir_fd=directory)
        os.fchmod(inner, member.mode & 0o755 | 0o700)
        os.close(inner)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(base, dir_fd=directory)
    if member.isreg():
        _write(contents, directory, base, member)
    elif member.issym():
        if not stays_inside(member.linkname, len(place.parts) - 1):
            raise UnsafePath(
                f"the guest sends {member.name[:200]!r}, a link to {member.linkname[:200]!r} outside the copy",
                hint=_HINT,
            )
        os.symlink(member.linkname, base, dir_fd=directory)
    elif member.islnk():
        target = _parts(member.linkname)
        if target[0] != place.parts[0] or len(target) == 1:
            raise UnsafePath(
                f"the guest sends {member.name[:200]!r}, a hard link to a file outside the copy", hint=_HINT
            )
        with _parent(place.root, place.renamed(target)) as (source, source_base):
            os.link(source_base, base, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
    else:
        raise UnsafePath(f"the guest sends {member.name[:200]!r}, which is a device or a pipe", hint=_HINT)


def stays_inside(target: str, depth: int) -> bool:
    """Return whether a link at `depth` directories below the top of the copy stays in the copy.

    The target may go up first, no further than the top, and then only down. Going up after going
    down through another link could end anywhere.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and "\0" not in target and up < depth and ".." not in parts[up:]


def _write(contents: _Contents, directory: int, base: str, member: tarfile.TarInfo) -> None:
    stream, ranges, budget = contents
    budget.spend(member.size)
    handle = os.open(base, _NEW_FILE, 0o600, dir_fd=directory)
    with os.fdopen(handle, "wb") as output:
        for offset, length in ranges:
            output.seek(offset)
            left = length
            while left > 0:
                chunk = _exactly(stream, min(left, _CHUNK))
                if chunk.count(0) == len(chunk):
                    output.seek(len(chunk), os.SEEK_CUR)  # a hole: a sparse file must not fill this disk
                else:
                    output.write(chunk)
                left -= len(chunk)
                budget.moved(len(chunk))
        output.truncate(member.size)
        os.fchmod(handle, member.mode & 0o755 | 0o600)
        os.utime(handle, (member.mtime, member.mtime))
    stored = sum(length for _, length in ranges)
    budget.moved(member.size - stored)
    _exactly(stream, -stored % _BLOCK)


# ---- reading the archive ----


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise GuestProtocolError(
            "the guest's archive is cut off", hint="check whether the guest still runs, and try again"
        )
    return data


def _members(stream: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, list[_Range]]]:
    """Yield the members (ustar and pax), each with its data ranges, for the caller to read."""
    records: dict[str, str] = {}
    while True:
        block = _exactly(stream, _BLOCK)
        if block == bytes(_BLOCK):
            while stream.read(_CHUNK):  # the rest is padding
                pass
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise GuestProtocolError("the guest sent something that is not an archive", hint="try again") from error
        if member.type == tarfile.XHDTYPE:
            if not 0 <= member.size <= _PAX_MAX:
                raise GuestProtocolError("the guest sent an extended header that is too long", hint="try again")
            records = _pax_records(_exactly(stream, member.size + -member.size % _BLOCK)[: member.size])
            continue
        member.name = records.get("path", member.name)
        member.linkname = records.get("linkpath", member.linkname)
        member.size = _number(records.get("size"), member.size, signed=False) if member.isreg() else 0
        member.mtime = _number(records.get("mtime"), int(member.mtime), signed=True)
        ranges = [(0, member.size)]
        if member.isreg() and "GNU.sparse.map" in records:
            ranges, member.size = _sparse(records, member.size)
        records = {}
        yield member, ranges


def _sparse(records: dict[str, str], stored: int) -> tuple[list[_Range], int]:
    """Return the data ranges and the size of a file with holes (GNU tar's sparse format 0.1)."""
    size = _number(records.get("GNU.sparse.size"), -1, signed=False)
    numbers = [_number(text, -1, signed=False) for text in records["GNU.sparse.map"].split(",", 2 * RANGES_MAX)]
    ranges = list(zip(numbers[::2], numbers[1::2], strict=False))
    ends = [0, *(offset + length for offset, length in ranges)]
    in_order = all(end <= offset for end, (offset, _) in zip(ends, ranges, strict=False))
    if len(numbers) % 2 or not in_order or ends[-1] > size or sum(length for _, length in ranges) != stored:
        raise GuestProtocolError("the guest sent a file with malformed holes", hint="try again")
    return ranges, size


def _number(text: str | None, default: int, *, signed: bool) -> int:
    number = default
    if text is not None and re.fullmatch(r"-?\d{1,18}(\.\d*)?", text, re.ASCII):
        number = int(text.partition(".")[0])
    if abs(number) >= 1 << 62 or (number < 0 and not signed):
        raise GuestProtocolError(f"the guest sent a header with the number {number}", hint="try again")
    return number


def _pax_records(data: bytes) -> dict[str, str]:
    records = {}
    at = 0
    while at < len(data):
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != 0x0A:
            raise GuestProtocolError("the guest sent a malformed extended header", hint="try again")
        records[match[2].decode("ascii", "replace")] = os.fsdecode(data[match.end() : end - 1])
        at = end
    return records
