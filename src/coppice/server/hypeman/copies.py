"""The WebSocket `/instances/{id}/cp` of the hypeman API: one file or directory into a guest, or a tree out of it.

Content for a guest passes through. A tree out of a guest is first kept below `uploads/`, since its frames need the
true size of each file before its content. It takes no space that the budgets reserve.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import msgspec
from litestar import websocket
from litestar.params import FromPath

from coppice.agent import records
from coppice.agent.copy import with_thread
from coppice.agent.records import Content, End, Entry, Item
from coppice.agent.unpack import parts_of, unpack
from coppice.completion import beside, in_thread
from coppice.errors import CoppiceError, GuestError, GuestRefused, NotSupported, UsageError
from coppice.host import LocalBackend
from coppice.model.guest import CopySession
from coppice.requests import FileMkdirRequest, OpenCopyRequest
from coppice.server.browsers import accept
from coppice.server.context import Server, TheCaller, TheServer
from coppice.server.copies import CHECK_EVERY, require_space, space_left
from coppice.server.failures import failure_of
from coppice.server.hypeman.instances import WRITE
from coppice.server.hypeman.sockets import decoded_frame, running
from coppice.server.streams import Socket, answering, frame_from, send, silence

_CHUNK: Final = 32 << 10
_MOST_BYTES: Final = 256 << 20  # of memory for the entries of a tree
_ENTRY: Final = 512  # bytes that an entry takes besides its names
_PATH_MAX: Final = 4096  # of Linux
_PERMISSIONS: Final = 0o777


Id = Annotated[int, msgspec.Meta(ge=0, lt=(1 << 32) - 1)]


class Copy(msgspec.Struct, kw_only=True):
    """The first frame of a copy."""

    direction: str
    guest_path: str
    is_dir: bool = False
    mode: int = 0  # 0: that of a new file or directory
    uid: Id | None = None
    gid: Id | None = None
    follow_links: bool = False


@websocket("/instances/{key:str}/cp", opt=WRITE)
async def instance_cp(key: FromPath[str], socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Copy one file or directory into the guest, or a file or tree out of it."""
    host = await server.host(caller)
    found = await running(host, key)
    await accept(socket)
    async with answering(socket, CoppiceError, _send_error):
        copy = decoded_frame(await frame_from(socket), Copy)
        if copy.direction not in _COPIES:
            raise UsageError(f"a copy has no direction {copy.direction!r}", hint="use to or from")
        request = OpenCopyRequest(instance=found.id)
        with server.observed(caller, host, request):
            await _COPIES[copy.direction](socket, server, host, request, copy)


async def _send_error(socket: Socket, error: Exception) -> None:
    await send(socket, type="error", message=failure_of(error)[1].message)


async def _copy_to(socket: Socket, _: Server, host: LocalBackend, request: OpenCopyRequest, copy: Copy) -> None:
    """Pass the content on to the guest. Missing parents are made, as in hypeman."""
    path = posixpath.normpath(copy.guest_path)
    directory, name = posixpath.split(path)
    await host.call(FileMkdirRequest(instance=request.instance, path=directory if name else path, parents=True))
    entry = Entry(
        path=name,
        kind="d" if copy.is_dir else "f",
        mode=copy.mode & 0o7777 or (0o755 if copy.is_dir else 0o644),
        uid=copy.uid or 0,
        gid=copy.gid or 0,
        mtime_ns=time.time_ns(),
    )
    written = 0

    async def items() -> AsyncIterator[bytes]:
        nonlocal written
        yield records.encode(entry)
        while isinstance(frame := await frame_from(socket), bytes):
            if copy.is_dir:
                raise UsageError("a directory has no content", hint="send the frame end")
            for at in range(0, len(frame), records.CONTENT_MAX):
                piece = frame[at : at + records.CONTENT_MAX]
                yield records.encode(Content(written, piece))
                written += len(piece)
        if decoded_frame(frame, dict[str, Any]).get("type") != "end":
            raise UsageError("the content ends with another frame than end", hint="see the API document")
        yield (b"" if copy.is_dir else records.encode(End(written))) + records.END

    if name:
        async with host.stream(request) as session:
            if copy.is_dir and copy.uid is None and copy.gid is None and await _is_directory(session, path):
                # The mode and owner of a directory such as /tmp stay. Only a copy with owners replaces them.
                async for _record in items():
                    pass
            else:
                await session.tree_in(directory, items())
    elif not copy.is_dir:
        raise UsageError("/ is a directory", hint="name a file")
    await send(socket, type="result", success=True, bytes_written=written)


async def _is_directory(session: CopySession, path: str) -> bool:
    try:
        return (await session.stat(path, follow=True)).kind == "d"
    except GuestRefused:
        return False


async def _copy_from(socket: Socket, server: Server, host: LocalBackend, request: OpenCopyRequest, copy: Copy) -> None:
    """Copy out of the guest, then send each member: a header, its content, and an end."""
    async with server.uploads.make(host.owner, "content") as kept:
        async with host.stream(request) as session:
            found = await beside(silence(socket), _received(session, copy.guest_path, kept.path, host))
        if copy.follow_links and any(each.kind == "l" for each in found.values()):
            raise NotSupported(f"{copy.guest_path} has symbolic links, which cannot be followed", hint="copy the links")
        members = await in_thread(_members, kept.path)  # no name of the guest is followed
        for each in members:
            name = str(each.relative_to(kept.path)) if each != kept.path else _name(copy.guest_path)
            await _send_member(socket, each, name, _entry(found, "" if each == kept.path else name))
            await send(socket, type="end", final=each == members[-1])


def _name(path: str) -> str:
    return posixpath.basename(posixpath.normpath(path)) or "root"


def _members(top: Path) -> list[Path]:
    """Return what is below a directory, or a file itself. An empty directory is its own member. Links are not
    followed.
    """
    inside = sorted(top.rglob("*")) if top.is_dir() and not top.is_symlink() else []
    return inside or [top]


def _entry(found: dict[str, Entry], name: str) -> Entry:
    """Return the entry of a member, or of its first name."""
    entry = found[name]
    return found.get("/".join(parts_of(entry.link)[1:]), entry) if entry.kind == "h" else entry


async def _received(session: CopySession, source: str, target: Path, host: LocalBackend) -> dict[str, Entry]:
    """Keep a file or tree of a guest. Return its entries, by their paths below its top.

    :raises GuestRefused: the source does not exist or cannot be read
    :raises NoSpace: it takes free space that the budgets reserve
    :raises GuestError: it has too many entries, or too long a path
    :raises NotSupported: a name in it is not UTF-8
    """
    found: dict[str, Entry] = {}
    unchecked, top = 0, len(os.fsencode(target)) + 1

    def noted(items: Iterator[Item]) -> Iterator[Item]:
        entries = 0
        for item in items:
            if isinstance(item, Entry):
                _require_text(item)
                if top + len(os.fsencode(item.path)) >= _PATH_MAX:
                    raise GuestError(f"{item.path[:200]!r} is too long for a path", hint="copy a part of it")
                found["/".join(parts_of(item.path)[1:])] = item
                entries += _ENTRY + 2 * len(item.path) + len(item.link)
                if entries > _MOST_BYTES:
                    raise GuestError(f"{source} has too many entries", hint="copy a part of it")
            yield item

    def moved(count: int) -> None:
        nonlocal unchecked
        unchecked += count
        if unchecked >= CHECK_EVERY:  # other copies take space at the same time
            require_space(host, target.parent)
            unchecked = 0

    def receive(stream: BinaryIO) -> None:
        unpack(noted(records.read(stream)), target.parent, target.name, max_bytes=space_left(host), moved=moved)

    async def fetch(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for chunk in session.tree_out(source):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()

    await with_thread(fetch, receive)
    return found


def _require_text(entry: Entry) -> None:
    """Require names that a JSON frame can carry.

    :raises NotSupported: one is not UTF-8
    """
    try:
        f"{entry.path}{entry.link}".encode()
    except UnicodeEncodeError as error:
        raise NotSupported(
            f"{entry.path[:200]!r} has a name or a target that is not UTF-8", hint="copy it with `coppice cp`"
        ) from error


async def _send_member(socket: Socket, file: Path, name: str, entry: Entry) -> None:
    status = file.lstat()
    is_link = stat.S_ISLNK(status.st_mode)
    await send(
        socket,
        type="header",
        path=name,
        mode=entry.mode & _PERMISSIONS,
        is_dir=stat.S_ISDIR(status.st_mode),
        size=status.st_size if stat.S_ISREG(status.st_mode) else 0,
        mtime=max(entry.mtime_ns, 0) // 1_000_000_000,
        uid=entry.uid,
        gid=entry.gid,
        **({"is_symlink": True, "link_target": entry.link} if is_link else {}),
    )
    if stat.S_ISREG(status.st_mode):
        with file.open("rb") as content:
            while chunk := await in_thread(content.read, _CHUNK):
                await socket.send_bytes(chunk)


_Carry = Callable[[Socket, Server, LocalBackend, OpenCopyRequest, Copy], Coroutine[Any, Any, None]]
_COPIES: Final[dict[str, _Carry]] = {"to": _copy_to, "from": _copy_from}

ROUTES: Final = [instance_cp]
