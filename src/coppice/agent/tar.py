"""Tar archives, for users that want one: made from the records of a tree, and turned into them.

The reader has bounds, since archives come from clients of a server: the standard library's reads as
much at once as a header claims.
"""

from __future__ import annotations

import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final

from coppice.agent.records import CONTENT_MAX, UNSIZED_MAX, Content, End, Entry, Item, Kind
from coppice.agent.unpack import parts_of
from coppice.errors import GuestProtocolError, UsageError

_BLOCK: Final = 512
_EXTENDED_MAX: Final = 1 << 16  # of an extended header, or a GNU long name
_SPOOLED: Final = 1 << 20  # bytes of a file of unknown size that are kept in memory
_RECORD = re.compile(rb"(\d{1,6}) ([^=]{1,64})=")
_KINDS: Final[dict[bytes, Kind]] = {
    tarfile.REGTYPE: "f",
    tarfile.AREGTYPE: "f",
    tarfile.CONTTYPE: "f",
    tarfile.DIRTYPE: "d",
    tarfile.SYMTYPE: "l",
    tarfile.LNKTYPE: "h",
    tarfile.CHRTYPE: "c",
    tarfile.BLKTYPE: "b",
    tarfile.FIFOTYPE: "p",
}
_TYPES: Final = {"f": tarfile.REGTYPE} | {kind: type_ for type_, kind in _KINDS.items() if kind != "f"}
_HINT: Final = "send an uncompressed tar archive, as of `tar c`"

_Range = tuple[int, int]  # offset and length


# ---- writing ----


def to_tar(items: Iterable[Item], stream: BinaryIO) -> None:
    """Write a tree as a tar archive (pax). Holes of files become zeros.

    :raises GuestProtocolError: a file has another size than its entry says
    :raises UnsafePath: an entry is outside the tree
    """
    items = iter(items)
    for entry in items:
        if not isinstance(entry, Entry):
            raise GuestProtocolError("the guest sent content without a file", hint="try again")
        for path in (entry.path, entry.link) if entry.kind == "h" else (entry.path,):
            parts_of(path)
        if entry.kind != "f":
            stream.write(_header(entry, 0))
        elif entry.size is not None:
            stream.write(_header(entry, entry.size))
            if _write_content(items, stream, entry.size) != entry.size:
                raise GuestProtocolError("the guest sent a file of another size than it promised", hint="try again")
            stream.write(bytes(-entry.size % _BLOCK))
        else:
            with tempfile.SpooledTemporaryFile(_SPOOLED) as spool:
                size = _write_content(items, spool, UNSIZED_MAX)  # type: ignore[arg-type]  # a BinaryIO in all but its stub
                stream.write(_header(entry, size))
                spool.seek(0)
                while data := spool.read(CONTENT_MAX):
                    stream.write(data)
                stream.write(bytes(-size % _BLOCK))
    stream.write(bytes(2 * _BLOCK))


def _write_content(items: Iterator[Item], stream: BinaryIO, most: int) -> int:
    """Write the content of a file, and return its size.

    :raises GuestProtocolError: it has more than `most` bytes, or no end
    """
    end = 0
    for item in items:
        if isinstance(item, Entry):
            break
        start = item.offset if isinstance(item, Content) else item.size
        if start + (len(item.data) if isinstance(item, Content) else 0) > most:
            raise GuestProtocolError("the guest sent a file of another size than it promised", hint="try again")
        while end < start:
            hole = min(CONTENT_MAX, start - end)
            stream.write(bytes(hole))
            end += hole
        if isinstance(item, End):
            return end
        stream.write(item.data)
        end += len(item.data)
    raise GuestProtocolError("the guest sent a file without its end", hint="try again")


def _header(entry: Entry, size: int) -> bytes:
    member = tarfile.TarInfo(entry.path)
    member.type = _TYPES[entry.kind]
    member.mode, member.uid, member.gid, member.size = entry.mode, entry.uid, entry.gid, size
    member.mtime = entry.mtime_ns // 10**9
    member.linkname = entry.link
    member.devmajor, member.devminor = entry.device
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


# ---- reading ----


def from_tar(stream: BinaryIO) -> Iterator[Item]:
    """Yield the tree of an archive: ustar, pax or GNU tar's; holes in GNU tar's sparse format 0.1.

    :raises UsageError: it is no archive, or is cut off, or has a member of another type
    """
    for member, ranges in _members(stream):
        kind = _KINDS.get(member.type)
        if kind is None:
            raise UsageError(f"{member.name[:200]!r} in the archive has the unknown type {member.type!r}", hint=_HINT)
        yield Entry(
            member.name,
            kind,
            member.mode & 0o7777,
            _owner(member.uid),
            _owner(member.gid),
            int(member.mtime) * 10**9,
            member.linkname if kind in ("l", "h") else "",
            (max(0, member.devmajor), max(0, member.devminor)) if kind in ("c", "b") else (0, 0),
            member.size if kind == "f" else None,
        )
        if kind != "f":
            continue
        for offset, length in ranges:
            at, end = offset, offset + length
            while at < end:
                yield Content(at, _exactly(stream, min(CONTENT_MAX, end - at)))
                at += min(CONTENT_MAX, end - at)
        yield End(member.size)
        _exactly(stream, -sum(length for _, length in ranges) % _BLOCK)


def _owner(number: int) -> int:
    if number < 0:
        raise UsageError(f"the archive has a file whose owner is {number}", hint=_HINT)
    return number


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise UsageError("the archive is cut off", hint=_HINT)
    return data


def _members(stream: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, list[_Range]]]:
    """Yield the members, each with its data ranges, for the caller to read."""
    records: dict[str, str] = {}
    while True:
        block = _exactly(stream, _BLOCK)
        if block == bytes(_BLOCK):
            while stream.read(CONTENT_MAX):  # the rest is padding
                pass
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UsageError("this is not a tar archive, or it is damaged", hint=_HINT) from error
        if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if not 0 <= member.size <= _EXTENDED_MAX:
                raise UsageError("an extended header of the archive is too long", hint=_HINT)
            data = _exactly(stream, member.size + -member.size % _BLOCK)[: member.size]
            if member.type == tarfile.XHDTYPE:
                records |= _pax_records(data)
            elif member.type != tarfile.XGLTYPE:
                key = "path" if member.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
                records[key] = os.fsdecode(data.partition(b"\0")[0])
            continue
        yield member, _complete(member, records)
        records = {}


def _complete(member: tarfile.TarInfo, records: dict[str, str]) -> list[_Range]:
    """Take over the fields of extended headers; return the data ranges of a file."""
    member.name = records.get("path", member.name)
    member.linkname = records.get("linkpath", member.linkname)
    member.uid = _number(records.get("uid"), member.uid)
    member.gid = _number(records.get("gid"), member.gid)
    member.mtime = _number(records.get("mtime"), int(member.mtime))
    if member.type not in _KINDS or _KINDS[member.type] != "f":
        return []  # no other type has contents, even with a size: a hard link may have its file's
    member.size = _number(records.get("size"), member.size)
    if member.size < 0:
        raise UsageError(f"the archive has a file of {member.size} bytes", hint=_HINT)
    if "GNU.sparse.map" not in records:
        if any(key.startswith("GNU.sparse.") for key in records):
            raise UsageError("the archive has a file with holes in an unknown format", hint="make it without --sparse")
        return [(0, member.size)]
    ranges, member.size = _sparse(records, member.size)
    return ranges


def _sparse(records: dict[str, str], stored: int) -> tuple[list[_Range], int]:
    """Return the data ranges and the size of a file with holes (GNU tar's sparse format 0.1)."""
    size = _number(records.get("GNU.sparse.size"), -1)
    numbers = [_number(text, -1) for text in records["GNU.sparse.map"].split(",")]
    ranges = list(zip(numbers[::2], numbers[1::2], strict=False))
    ends = [0, *(offset + length for offset, length in ranges)]
    in_order = all(end <= offset and length >= 0 for end, (offset, length) in zip(ends, ranges, strict=False))
    if len(numbers) % 2 or not in_order or ends[-1] > size or sum(length for _, length in ranges) != stored:
        raise UsageError("the archive has a file with malformed holes", hint=_HINT)
    return ranges, size


def _number(text: str | None, default: int) -> int:
    number = default
    if text is not None:
        if not re.fullmatch(r"-?\d{1,18}(\.\d*)?", text, re.ASCII):
            raise UsageError(f"the archive has the number {text[:40]!r}", hint=_HINT)
        number = int(text.partition(".")[0])
    if abs(number) >= 1 << 62:
        raise UsageError(f"the archive has the number {number}", hint=_HINT)
    return number


def _pax_records(data: bytes) -> dict[str, str]:
    records = {}
    at = 0
    while at < len(data):
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != 0x0A:
            raise UsageError("an extended header of the archive is malformed", hint=_HINT)
        records[match[2].decode("ascii", "replace")] = os.fsdecode(data[match.end() : end - 1])
        at = end
    return records
