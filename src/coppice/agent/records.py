"""Trees of files as records: the form in which they pass between host and guest.

docs/agent-protocol.md is the contract. A tree is a list of entries. The content of a file follows its
entry, and its end has its true length. The sender may be hostile: the decoder keeps one record.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Final, Literal, NamedTuple, cast, get_args

from coppice.agent.protocol import Fields, encode_fields
from coppice.errors import GuestProtocolError

Kind = Literal["f", "d", "l", "c", "b", "p", "h"]
"""As in FileStat; `h` is a further name of an earlier file."""

PAYLOAD_MAX: Final = 65536
CONTENT_MAX: Final = PAYLOAD_MAX - 8
UNSIZED_MAX: Final = 64 << 20
"""Bytes of a file without a true size, such as those of /proc."""
ENTRY, _CONTENT, _END_FILE, END_TREE, EVENT = 1, 2, 3, 4, 5
HEADER = struct.Struct("<BI")
_CONTENT_HEADER = struct.Struct("<BIQ")
_NUMBER = struct.Struct("<Q")
_KINDS = frozenset(get_args(Kind))
_I64_MAX: Final = (1 << 63) - 1
_AGAIN: Final = "check whether the guest still runs, and try again"


END: Final = HEADER.pack(END_TREE, 0)
"""The record at the end of a tree."""


class Entry(NamedTuple):
    """A file, directory, link or other member of a tree. The content of a file follows."""

    path: str  # with "/" between its components
    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    link: str = ""  # the target of a symbolic link, or the first name of a file
    device: tuple[int, int] = (0, 0)
    size: int | None = None  # of a file; None: unknown until its end


class Content(NamedTuple):
    """Bytes of a file. They are in order; what is left out between them is a hole."""

    offset: int
    data: bytes


class End(NamedTuple):
    """The end of a file, with its true length."""

    size: int


Item = Entry | Content | End


def encode(item: Item) -> bytes:
    """Return the record of one item.

    :raises UsageError: a path or link contains a zero byte
    """
    if isinstance(item, Content):
        return _CONTENT_HEADER.pack(_CONTENT, 8 + len(item.data), item.offset) + item.data
    if isinstance(item, End):
        return HEADER.pack(_END_FILE, _NUMBER.size) + _NUMBER.pack(item.size)
    mtime = max(-_I64_MAX, min(item.mtime_ns, _I64_MAX))
    fields: list[tuple[int, int | str | None]] = [
        (8, item.path),
        (1, item.kind),
        (2, item.size),
        (3, item.mode),
        (4, item.uid),
        (5, item.gid),
        (6, mtime & ((1 << 64) - 1)),
        (7, item.link or None),
    ]
    if item.kind in ("c", "b"):
        fields += [(9, item.device[0]), (10, item.device[1])]
    payload = encode_fields(fields)
    return HEADER.pack(ENTRY, len(payload)) + payload


def write(items: Iterable[Item], stream: BinaryIO) -> None:
    """Write the records of a tree, and its end."""
    for item in items:
        stream.write(encode(item))
    stream.write(END)


def read(stream: BinaryIO) -> Iterator[Item]:
    """Yield the items of a tree. Each file's content is in order, and followed by its end.

    :raises GuestProtocolError: the records are malformed, or end in the middle
    """
    end: int | None = None  # of the content so far; None: no file is open
    while True:
        kind, size = HEADER.unpack(_exactly(stream, HEADER.size))
        if size > PAYLOAD_MAX:
            raise _malformed("a record is too long")
        if kind == _CONTENT and end is not None and size >= _NUMBER.size:
            (offset,) = _NUMBER.unpack(_exactly(stream, _NUMBER.size))
            if offset < end or offset > _I64_MAX - size:
                raise _malformed("the content of a file is not in order")
            end = offset + size - _NUMBER.size
            yield Content(offset, _exactly(stream, size - _NUMBER.size))
            continue
        payload = _exactly(stream, size)
        if kind == _END_FILE and end is not None and size == 8:
            (length,) = _NUMBER.unpack(payload)
            if not end <= length <= _I64_MAX:
                raise _malformed("a file ends before its content")
            end = None
            yield End(length)
        elif kind == ENTRY and end is None:
            entry = _entry(Fields(payload))
            end = 0 if entry.kind == "f" else None
            yield entry
        elif kind == END_TREE and end is None and size == 0:
            return
        else:
            raise _malformed(f"a record of type {kind} makes no sense there")


def _entry(fields: Fields) -> Entry:
    kind = fields.raw(1) or b""
    path = fields.raw(8)
    mtime = fields.integer(6, 0)
    if path is None or kind.decode("ascii", "replace") not in _KINDS:
        raise _malformed("an entry has no path or no kind")
    return Entry(
        path=os.fsdecode(path),
        kind=cast(Kind, kind.decode("ascii")),
        mode=fields.integer(3, 0) & 0o7777,
        uid=fields.integer(4, 0),
        gid=fields.integer(5, 0),
        mtime_ns=mtime - (1 << 64) if mtime >> 63 else mtime,
        link=os.fsdecode(fields.raw(7) or b""),
        device=(fields.integer(9, 0), fields.integer(10, 0)),
        size=None if fields.raw(2) is None else fields.integer(2),
    )


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise GuestProtocolError("the guest's tree is cut off", hint=_AGAIN)
    return data


def _malformed(what: str) -> GuestProtocolError:
    return GuestProtocolError(f"the guest sent a malformed tree: {what}", hint=_AGAIN)
