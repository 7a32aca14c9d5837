"""WebSockets `/stream/copy` and `/stream/upload`: files of the client's machine, as streams.

`/stream/copy` is the session of `cp_in` and `cp_out`. The client sends an OpenCopyRequest, and gets
`{}`. Then it sends one text frame after the other, each answered before the next:
`{"stat": {"path": ..., "follow": ...}}`, answered by `{"stat": {...}}`;
`{"tar_out": PATH}`, answered by binary frames of a tar archive, then `{"end": true}`; and
`{"tar_in": DIRECTORY}`, followed by binary frames of an archive and `{"eof": true}`, answered by
`{"unpacked": {...}}`. `{"tree_out": {"path": ..., "contents": ...}}` and `tree_in` are the same with
the records of docs/agent-protocol.md instead of an archive: they keep holes, and the server passes them
on unchanged.

`/stream/upload` takes a file or directory for a request. The client sends an Upload, then binary
frames and `{"eof": true}`, and gets `{"upload": "upload:SHA256"}`, which a request can name until the
client closes the connection. The same frames give the same name, so that a request with an
idempotency key can be repeated. A directory is sent as a tar archive, or as records if `tree` is true.

All can answer `{"error": {...}, "errno": N}`, at any time; an error of `stat` leaves the session open.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from litestar import websocket

from coppice.agent import records
from coppice.agent.copy import archive_in, archive_out, with_thread
from coppice.agent.tar import from_tar
from coppice.agent.unpack import unpack
from coppice.completion import beside
from coppice.errors import GuestProtocolError, GuestRefused, NoSpace, UnsafePath, UsageError
from coppice.host import LocalBackend
from coppice.model import MIB
from coppice.model.guest import CopySession
from coppice.requests import OpenCopyRequest
from coppice.requests.base import paths_of
from coppice.server.context import TheCaller, TheServer, require
from coppice.server.failures import failure_of
from coppice.server.streams import Socket, answering, decoded, first_frame, frame_from, send, silence
from coppice.server.table import REQUESTS, scope_of
from coppice.server.uploads import PREFIX
from coppice.server.uploads import Upload as UploadedFile

CHECK_EVERY: Final = 16 * MIB  # received bytes between two checks of the free space
_CHUNK: Final = 1 << 16


class Stat(msgspec.Struct, forbid_unknown_fields=True):
    """The question for the status of a path."""

    path: str
    follow: bool = False


class TreeOut(msgspec.Struct, forbid_unknown_fields=True):
    """The request for the records of a file or tree, or of the entries of a directory."""

    path: str
    contents: bool = False


class Step(msgspec.Struct, forbid_unknown_fields=True):
    """A text frame of a client that copies."""

    stat: Stat | None = None
    tar_out: str | None = None
    tar_in: str | None = None
    tree_out: TreeOut | None = None
    tree_in: str | None = None
    eof: bool = False


class Upload(msgspec.Struct, forbid_unknown_fields=True):
    """The first frame of an upload: the operation that it is for, its name and its kind."""

    operation: str
    name: str
    directory: bool = False
    tree: bool = False


async def send_error(socket: Socket, error: Exception) -> None:
    """Send the frame of an error, with the errno of a guest."""
    errno = error.errno if isinstance(error, GuestRefused) else 0
    await send(socket, error=failure_of(error)[1], errno=errno)


@websocket("/stream/copy", opt={"scope": scope_of("cp_in")})
async def stream_copy(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Copy between a guest and the client's machine. A client that goes away ends the copy."""
    async with answering(socket, report=send_error):
        request = await first_frame(socket, OpenCopyRequest)
        host = await server.host(caller)
        with server.observed(caller, host, request):
            await _copy(socket, host, request)


async def _copy(socket: Socket, host: LocalBackend, request: OpenCopyRequest) -> None:
    async with host.stream(request) as session:
        await send(socket)
        while True:
            await _step(socket, session)


async def _step(socket: Socket, session: CopySession) -> None:
    step = decoded(await frame_from(socket), Step, "a text frame is not valid")
    if step.stat is not None:
        try:
            found = await session.stat(step.stat.path, follow=step.stat.follow)
            if any("\udc80" <= each <= "\udcff" for each in found.link_target or ""):  # JSON cannot carry it
                raise GuestRefused(f"{step.stat.path} is a link whose target is not UTF-8", hint="copy its target")
        except GuestRefused as error:
            await send_error(socket, error)
        else:
            await send(socket, stat=found)
    elif step.tar_out is not None:
        await beside(silence(socket), archive_out(session, step.tar_out, socket.send_bytes))
        await send(socket, end=True)
    elif step.tree_out is not None:
        await beside(
            silence(socket), _send_all(socket, session.tree_out(step.tree_out.path, contents=step.tree_out.contents))
        )
        await send(socket, end=True)
    elif step.tar_in is not None:
        await send(socket, unpacked=await archive_in(session, content_frames(socket), step.tar_in))
    elif step.tree_in is not None:
        await send(socket, unpacked=await session.tree_in(step.tree_in, content_frames(socket)))
    else:
        raise UsageError("a text frame asks for nothing", hint="send stat, tar_in, tar_out, tree_in or tree_out")


async def _send_all(socket: Socket, chunks: AsyncIterator[bytes]) -> None:
    async for chunk in chunks:
        await socket.send_bytes(chunk)


async def content_frames(socket: Socket) -> AsyncIterator[bytes]:
    """Yield the binary frames of a client until its frame `eof`.

    :raises UsageError: it sends another text frame
    """
    while isinstance(frame := await frame_from(socket), bytes):
        yield frame
    if not decoded(frame, Step, "a text frame is not valid").eof:
        raise UsageError("the content ends with another frame than eof", hint='send `{"eof": true}`')


@websocket("/stream/upload")
async def stream_upload(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Receive a file or directory, and keep it until the client goes away."""
    async with answering(socket, report=send_error):
        first: Upload = await first_frame(socket, Upload)
        kind = REQUESTS.get(first.operation)
        if kind is None or not paths_of(kind):
            raise UsageError(f"no operation {first.operation!r} takes files", hint="see the API document")
        require(caller, scope_of(first.operation))
        host = await server.host(caller)
        async with server.uploads.make(caller.owner, first.name) as upload:
            await _receive(socket, host, upload, first)
            upload.complete = True
            await send(socket, upload=upload.by_content)
            await frame_from(socket)  # raises when the client has closed the connection


async def _receive(socket: Socket, host: LocalBackend, upload: UploadedFile, first: Upload) -> None:
    """Write the content to the disk of the server.

    :raises NoSpace: it would take the free space that the budgets reserve
    :raises UsageError: the archive of a directory is not valid
    """

    def write(stream: BinaryIO) -> None:
        if first.directory:
            items = records.read(stream) if first.tree else from_tar(stream)
            unpack(items, upload.directory, upload.name)
        else:
            with upload.path.open("xb") as output:
                while chunk := stream.read(_CHUNK):
                    output.write(chunk)

    digest = hashlib.sha256(msgspec.json.encode(first))

    async def pass_on(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unchecked = CHECK_EVERY
        async for chunk in content_frames(socket):
            unchecked += len(chunk)
            if unchecked >= CHECK_EVERY:
                require_space(host, upload.directory)
                unchecked = 0
            digest.update(chunk)
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()

    try:
        await with_thread(pass_on, write)
        upload.by_content = f"{PREFIX}{digest.hexdigest()}"
    except (GuestProtocolError, UnsafePath) as error:
        raise UsageError(error.message.replace("the guest", "the client"), hint="send a tar archive") from error


def space_left(host: LocalBackend) -> int:
    """Return how many bytes a file may take without the free space that the budgets reserve. Blocks."""
    disk = os.statvfs(host.home)
    return max(0, disk.f_bavail * disk.f_frsize - host.budgets.disk_floor_bytes)


def require_space(host: LocalBackend, directory: Path) -> None:
    """Require the free space that the budgets reserve, after `CHECK_EVERY` more bytes.

    :raises NoSpace: there is less
    """
    disk = os.statvfs(directory)
    if disk.f_bavail * disk.f_frsize - CHECK_EVERY < host.budgets.disk_floor_bytes:
        raise NoSpace(
            "the server has no disk space for this file",
            hint="free space there with `coppice rm` and `coppice gc --caches`",
        )
