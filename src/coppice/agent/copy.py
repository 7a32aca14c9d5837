"""Copy files and trees between host and guest. `coppice.agent.place` decides where a copy goes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import posixpath
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from coppice.agent import records, tar
from coppice.agent.pack import content_bytes, pack
from coppice.agent.place import is_contents, place
from coppice.agent.unpack import unpack
from coppice.completion import beside, both, complete
from coppice.errors import CoppiceError, GuestRefused, HostCannot, NoSpace, NotFound
from coppice.model import ProgressSink, no_progress
from coppice.model.guest import CopySession, Unpacked
from coppice.model.progress import Meter

A = TypeVar("A")
B = TypeVar("B")

_CHUNK = 1 << 16
_BUFFER = 1 << 18  # of the thread's end of a socket pair
_LINKS_MAX = 40
_NOTHING = (errno.ENOENT, errno.ENOTDIR)
_KINDS = {"d": stat.S_ISDIR, "l": stat.S_ISLNK, "f": stat.S_ISREG}


async def copy_in(
    session: CopySession,
    source: Path | str,
    destination: str,
    *,
    keep_owners: bool = False,
    progress: ProgressSink = no_progress,
) -> Unpacked:
    """Copy a file or tree of the host into the guest. It belongs to root unless `keep_owners`. Links
    stay links.

    :param source: a path. As text, `DIR/.` names the contents of a directory, and `LINK/` the
        directory that a link leads to
    :param destination: an existing directory to copy into, or a new name in one
    :param progress: called from a thread
    :raises NotFound: the source or the directory to copy into does not exist
    :raises UsageError: a directory would replace a file, or a file a directory
    :raises GuestRefused: the guest cannot write the copy
    """
    source = os.fspath(source)
    kind = _kind_here(source, False)
    if kind is None:
        raise NotFound(f"{source} does not exist", hint="give the path of a file or directory on this machine")
    destination = await _followed(session, destination) if kind == "f" else destination
    directory, name = await place(source, kind, destination, _Guest(session).look, "coppice exec NAME -- mkdir -p")
    path = Path(source).resolve() if kind == "d" else Path(source)

    def work(stream: BinaryIO) -> None:
        meter = Meter(progress, content_bytes(path))
        records.write(pack(path, name, owner=None if keep_owners else (0, 0), moved=meter.moved), stream)

    async def send(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> Unpacked:
        return await session.tree_in(directory, read_chunks(reader))

    unpacked, _ = await with_thread(send, work)
    return unpacked


async def copy_out(
    session: CopySession,
    source: str,
    destination: Path | str,
    *,
    outside_links: bool = False,
    progress: ProgressSink = no_progress,
) -> int:
    """Copy a file or tree of the guest to the host; return the bytes of contents.

    The copy belongs to this user, whatever its owner in the guest.

    :param source: a path. `DIR/.` names the contents of a directory, and `LINK/` the directory that
        a link leads to
    :param destination: an existing directory to copy into, or a new name in one
    :param outside_links: make symbolic links that lead out of the copy too
    :param progress: called from a thread; the total of a tree is unknown
    :raises NotFound: the directory to copy into does not exist
    :raises UsageError: a directory would replace a file, or a file a directory
    :raises GuestRefused: the source does not exist or cannot be read
    :raises NoSpace: the disk is full
    :raises UnsafePath: the guest sent a path outside the destination, a device, or a link that leads out
    """
    destination = os.fspath(destination)
    found = await session.stat(source)
    through = found.kind == "f" and not destination.endswith("/") and _kind_here(destination, True) in (None, "f")
    if through and Path(destination).is_symlink():
        destination = str(Path(destination).resolve())  # write through the link, as cp does
    parent, name = await place(source, found.kind, destination, _look_here, "mkdir -p")

    def receive(stream: BinaryIO) -> int:
        meter = Meter(progress, found.size_bytes if found.kind == "f" else None)
        items = records.read(stream)
        return unpack(items, Path(parent), name, outside_links=outside_links, moved=meter.moved)

    async def fetch(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = f"{source}." if source.endswith("/") else source  # LINK/ names the link's directory
        await _write_chunks(writer, session.tree_out(inside))

    _, written = await with_thread(fetch, receive)
    return written


async def archive_in(session: CopySession, archive: AsyncIterator[bytes], directory: str) -> Unpacked:
    """Unpack a tar archive below a directory of the guest, with the owners, modes and times of its members.

    :raises UsageError: it is no archive, or is cut off; the members before that remain
    :raises GuestRefused: the guest cannot make a member; the members before it remain
    """

    def convert(stream: BinaryIO) -> None:
        records.write(tar.from_tar(stream), stream)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Unpacked:
        return await beside(_write_chunks(writer, archive), session.tree_in(directory, read_chunks(reader)))

    unpacked, _ = await with_thread(talk, convert)
    return unpacked


async def archive_out(session: CopySession, source: str, sink: Callable[[bytes], Awaitable[None]]) -> None:
    """Send a file or tree of the guest as a tar archive to `sink`. `DIR/.` names the contents of a directory.

    :raises GuestRefused: the source does not exist or cannot be read
    """

    def convert(stream: BinaryIO) -> None:
        tar.to_tar(records.read(stream), stream)

    contents = is_contents(source) and (await session.stat(source, follow=True)).kind == "d"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def pass_on() -> None:
            async for chunk in read_chunks(reader):
                await sink(chunk)

        await both(_write_chunks(writer, session.tree_out(source, contents=contents)), pass_on())

    await with_thread(talk, convert)


class _Guest(NamedTuple):
    session: CopySession

    async def look(self, path: str, follow: bool) -> str | None:
        try:
            return (await self.session.stat(path, follow=follow)).kind
        except GuestRefused as error:
            if error.errno not in _NOTHING:
                raise
            return None


async def _followed(session: CopySession, path: str) -> str:
    """Return the final target of a link in the guest: cp writes a file through its link, too."""
    followed = path
    for _ in range(_LINKS_MAX):
        try:
            found = await session.stat(followed)
        except GuestRefused as error:
            if error.errno not in _NOTHING:
                raise
            break
        if found.link_target is None:
            break
        followed = posixpath.join(posixpath.dirname(followed), found.link_target)
    return followed


async def _look_here(path: str, follow: bool) -> str | None:
    return _kind_here(path, follow)


def _kind_here(path: str, follow: bool) -> str | None:
    """Return the kind of a path of this host as the agent names it: `d`, `l`, `f`, or else `o`."""
    try:
        mode = (os.stat if follow else os.lstat)(path).st_mode
    except OSError as error:
        if error.errno not in _NOTHING:
            raise _host_error(error) from error
        return None
    return next((kind for kind, is_kind in _KINDS.items() if is_kind(mode)), "o")


async def read_chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the bytes of a reader."""
    while chunk := await reader.read(_CHUNK):
        yield chunk


async def _write_chunks(writer: asyncio.StreamWriter, chunks: AsyncIterator[bytes]) -> None:
    async for chunk in chunks:
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()


async def with_thread(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[A]], work: Callable[[BinaryIO], B]
) -> tuple[A, B]:
    """Run `work` in a thread on one end of a socket pair and `talk` on the other; both have ended
    on return.

    If both fail, the first failure is raised.
    """
    ours, theirs = socket.socketpair()
    failed: list[Exception] = []

    def run() -> B:
        with theirs:
            try:
                with theirs.makefile("rwb", buffering=_BUFFER) as stream:
                    return work(stream)  # type: ignore[arg-type]  # a BufferedRWPair is a BinaryIO in all but its stub
            except Exception as error:
                failed.append(error)
                raise

    reader, writer = await asyncio.open_unix_connection(sock=ours)
    # A thread of its own: the guest decides how long it lasts, and the loop's few threads are
    # shared.
    executor = ThreadPoolExecutor(1, "copy")
    thread = asyncio.get_running_loop().run_in_executor(executor, run)
    try:
        talked = await talk(reader, writer)
        worked = await asyncio.shield(thread)
    except BaseException as error:
        first = failed[0] if failed and isinstance(error, Exception) else error
        writer.transport.abort()
        try:
            await complete(asyncio.wait({thread}))  # also if this task is cancelled once more
        finally:
            thread.exception()  # retrieved: otherwise the loop would log it
        if isinstance(first, OSError):
            raise _host_error(first) from error
        raise first from None
    finally:
        executor.shutdown(wait=False)
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return talked, worked


def _host_error(error: OSError) -> CoppiceError:
    message = f"cannot copy: {error.filename or 'the file'}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message, hint="free disk space, or copy to another file system")
    return HostCannot(message, hint="check the permissions and kinds of these files with `ls -la` on this machine")
