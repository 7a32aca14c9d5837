"""Names in a guest: list a directory, make, move and remove, and watch for changes."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from coppice.agent.channel import Channel
from coppice.agent.protocol import Fields, FrameType, encode_fields
from coppice.agent.records import END_TREE, ENTRY, EVENT, HEADER, PAYLOAD_MAX
from coppice.errors import GuestProtocolError
from coppice.model import FileEvent, FileEventKind, FileStat

_WITH_PARENTS, _KEEP_EXISTING, _RECURSIVE, _MISSING_OK = 1, 1, 1, 2
_WATCH_RECURSIVE = 1
_IS_DIRECTORY: Final = 0x40000000
_EVENTS: Final[dict[int, FileEventKind]] = {
    0: "watching",
    0x2: "modified",
    0x4: "attributes",
    0x8: "closed",
    0x40: "moved_from",
    0x80: "moved_to",
    0x100: "created",
    0x200: "deleted",
    0x400: "gone",
    0x4000: "overflow",
}
"""By the bit of inotify(7)."""


def stat_of(path: str, fields: Fields) -> FileStat:
    """Return the status of a path from its fields.

    :raises GuestProtocolError: the guest's fields are malformed
    """
    mtime_ns = fields.integer(6)
    target = fields.raw(7)
    try:
        return msgspec.convert(
            {
                "path": path,
                "kind": fields.text(1),
                "size_bytes": fields.integer(2),
                "mode": fields.integer(3) & 0o7777,
                "uid": fields.integer(4),
                "gid": fields.integer(5),
                "mtime": (mtime_ns - (1 << 64) if mtime_ns >> 63 else mtime_ns) / 1e9,
                "link_target": None if target is None else os.fsdecode(target),
            },
            FileStat,
        )
    except msgspec.ValidationError as error:
        raise _malformed(f"the status of {path} is malformed: {error}") from error


async def listing(channel: Channel, path: str) -> AsyncGenerator[FileStat, None]:
    """Yield the entries of a directory, in its order.

    :raises GuestRefused: the directory cannot be read
    """
    complete = False
    async with contextlib.aclosing(_records(channel, FrameType.FILE_LIST, encode_fields([(1, path)]))) as records:
        async for kind, payload in records:
            if complete or kind not in (ENTRY, END_TREE):
                raise _malformed(f"a record of type {kind} in the list of a directory")
            complete = kind == END_TREE
            if kind == ENTRY:
                fields = Fields(payload)
                name = fields.raw(8) or b""
                if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
                    raise _malformed("an entry of a directory has no name")
                yield stat_of(posixpath.join(path, os.fsdecode(name)), fields)
    if not complete:
        raise _malformed("a directory's list is cut off")


async def watching(channel: Channel, path: str, *, recursive: bool) -> AsyncGenerator[FileEvent, None]:
    """Yield the changes of a file or directory, `watching` first.

    :raises GuestRefused: the path cannot be watched
    """
    fields = encode_fields([(1, path), (2, _WATCH_RECURSIVE if recursive else 0)])
    async with contextlib.aclosing(_records(channel, FrameType.FILE_WATCH, fields)) as records:
        async for kind, payload in records:
            if kind != EVENT:
                raise _malformed(f"a record of type {kind} among events")
            yield _event_of(path, Fields(payload))


def _event_of(path: str, fields: Fields) -> FileEvent:
    mask, below = fields.integer(11), os.fsdecode(fields.raw(8) or b"")
    word = _EVENTS.get(mask & 0xFFFF)
    if word is None or below.startswith("/") or ".." in below.split("/") or "\0" in below:
        raise _malformed(f"an event has the mask {mask:#x} and the path {below[:200]!r}")
    return FileEvent(
        kind=word,
        path=posixpath.join(path, below) if below else path,
        is_directory=bool(mask & _IS_DIRECTORY),
        cookie=fields.integer(12, 0) & 0xFFFFFFFF,
    )


async def make_directory(channel: Channel, path: str, *, mode: int, parents: bool) -> None:
    """Make a directory.

    :raises GuestRefused: it cannot be made
    """
    fields = encode_fields([(1, path), (2, _WITH_PARENTS if parents else 0), (4, mode)])
    await channel.call(FrameType.FILE_MKDIR, fields)


async def move(channel: Channel, path: str, destination: str, *, keep_existing: bool) -> None:
    """Rename a path.

    :raises GuestRefused: it cannot be renamed
    """
    fields = encode_fields([(1, path), (2, _KEEP_EXISTING if keep_existing else 0), (3, destination)])
    await channel.call(FrameType.FILE_MOVE, fields)


async def remove(channel: Channel, path: str, *, recursive: bool, missing_ok: bool) -> None:
    """Remove a path. It may take long, so no answer is waited for with a deadline; the keepalive of the
    connection limits the wait.

    :raises GuestRefused: it cannot be removed; some of its entries may have been
    """
    flags = (_RECURSIVE if recursive else 0) | (_MISSING_OK if missing_ok else 0)
    stream = await channel.open(FrameType.FILE_REMOVE, encode_fields([(1, path), (2, flags)]))
    try:
        stream.final(await stream.receive())
    finally:
        stream.abandon()


async def _records(channel: Channel, kind: FrameType, fields: bytes) -> AsyncGenerator[tuple[int, bytes], None]:
    stream = await channel.open(kind, fields)
    waiting = bytearray()
    try:
        async for chunk in stream.data():
            waiting += chunk
            at = 0
            while len(waiting) - at >= HEADER.size:
                record, size = HEADER.unpack_from(waiting, at)
                if size > PAYLOAD_MAX:
                    raise _malformed("a record is too long")
                if len(waiting) - at - HEADER.size < size:
                    break
                at += HEADER.size + size
                yield record, bytes(waiting[at - size : at])
            del waiting[:at]
    finally:
        stream.abandon()


def _malformed(what: str) -> GuestProtocolError:
    return GuestProtocolError(
        f"the guest broke the agent protocol: {what}", hint="run `coppice stop NAME`, then `coppice start NAME`"
    )
