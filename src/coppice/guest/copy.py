"""Copying files and trees between host and guest, as `cp -r` would: into a directory that is there, or under a new name."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import posixpath
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from coppice.errors import CoppiceError, GuestRefused, HostCannot, NoSpace, NotFound, UsageError
from coppice.guest.pack import content_bytes, pack
from coppice.guest.session import Session, Unpacked
from coppice.guest.unpack import unpack
from coppice.model import MIB, Progress, ProgressSink, no_progress

A = TypeVar("A")
B = TypeVar("B")

_CHUNK = 1 << 16


class _Meter:
    """Tells a sink how many bytes of contents have gone, once per MiB."""

    def __init__(self, sink: ProgressSink, total: int | None) -> None:
        self._sink = sink
        self._total = total
        self._done = self._told = 0
        self._tell()

    def moved(self, size: int) -> None:
        self._done += size
        if self._done - self._told >= MIB or self._told < self._done == self._total:
            self._tell()

    def _tell(self) -> None:
        self._told = self._done
        self._sink(Progress(stage="copy", done=self._done, total=self._total, unit="bytes"))


async def copy_in(
    session: Session,
    source: Path,
    destination: str,
    *,
    uid: int = 0,
    gid: int = 0,
    progress: ProgressSink = no_progress,
) -> Unpacked:
    """Copy a file or tree of the host into the guest, owned by `uid` and `gid`. Links stay links.

    :param destination: a directory that is there, to copy into; or a new name in one
    :param progress: is called from a thread
    :raises NotFound: the source is not there
    :raises GuestRefused: the guest cannot make it
    """
    if not os.path.lexists(source):
        raise NotFound(f"{source} is not there", hint="give the path of a file or directory on this machine")
    directory, name = await _target_in_guest(session, destination, source)

    def work(stream: BinaryIO) -> None:
        meter = _Meter(progress, content_bytes(source))
        pack(stream, source, name, uid=uid, gid=gid, holes=session.keeps_holes, moved=meter.moved)

    async def send(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> Unpacked:
        return await session.tar_in(directory, _chunks(reader))

    unpacked, _ = await _with_thread(send, work)
    return unpacked


async def copy_out(
    session: Session,
    source: str,
    destination: Path,
    *,
    max_bytes: int | None = None,
    progress: ProgressSink = no_progress,
) -> int:
    """Copy a file or tree of the guest to the host; return the bytes of contents. It is ours, whoever owned it in the guest.

    :param destination: a directory that is there, to copy into; or a new name in one
    :param max_bytes: contents may be so large altogether
    :param progress: is called from a thread; of a tree it does not know the total
    :raises GuestRefused: it is not there, or cannot be read
    :raises UnsafePath: the guest sent something that leads out of the destination, or a device
    """
    name = posixpath.basename(posixpath.normpath(source)) or "root"
    parent = destination
    if not destination.is_dir():
        parent, name = destination.parent, destination.name
    if not parent.is_dir():
        raise NotFound(f"the directory {parent} is not there", hint="make it first")
    if name in ("", ".", ".."):
        raise UsageError(f"{source} has no name to copy it under", hint="give the new name as the destination")

    found = await session.stat(source.rstrip("/") or "/")

    def receive(stream: BinaryIO) -> int:
        meter = _Meter(progress, found.size_bytes if found.kind == "f" else None)
        return unpack(stream, parent, name, max_bytes=max_bytes, moved=meter.moved)

    async def fetch(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for chunk in session.tar_out(source, holes=True):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()

    _, written = await _with_thread(fetch, receive)
    return written


async def _target_in_guest(session: Session, destination: str, source: Path) -> tuple[str, str]:
    """The directory to unpack in, and the name that the copy has there."""
    try:
        is_directory = (await session.stat(destination, follow=True)).kind == "d"
    except GuestRefused as error:
        if error.errno != errno.ENOENT:
            raise
        is_directory = False
    if is_directory:
        name = source.name or source.resolve().name
        directory = destination
    else:
        directory, name = posixpath.split(destination.rstrip("/"))
        directory = directory or "."
    if name in ("", ".", ".."):
        raise UsageError(f"{source} has no name to copy it under", hint="give the new name as the destination")
    return directory, name


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while chunk := await reader.read(_CHUNK):
        yield chunk


async def _with_thread(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[A]], work: Callable[[BinaryIO], B]
) -> tuple[A, B]:
    """Run `work` in a thread on one end of a socket pair and `talk` on the other; both have ended on return.

    Where both fail, the one that failed first says why.
    """
    ours, theirs = socket.socketpair()
    failed: list[Exception] = []

    def run() -> B:
        with theirs:
            try:
                with theirs.makefile("rwb") as stream:
                    return work(stream)  # type: ignore[arg-type]  # a BufferedRWPair is a BinaryIO in all but its stub
            except Exception as error:
                failed.append(error)
                raise

    reader, writer = await asyncio.open_unix_connection(sock=ours)
    # A thread of its own: it lasts as long as the guest likes, and the loop's few are for everybody.
    executor = ThreadPoolExecutor(1, "copy")
    thread = asyncio.get_running_loop().run_in_executor(executor, run)
    try:
        talked = await talk(reader, writer)
        worked = await asyncio.shield(thread)
    except BaseException as error:
        first = failed[0] if failed and isinstance(error, Exception) else error
        writer.transport.abort()
        await asyncio.wait({thread})
        thread.exception()  # seen: else the loop would complain of it once more
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
        return NoSpace(message, hint="free some space, or copy somewhere else")
    return HostCannot(message, hint="see the rights and the kinds of the files on this machine")
