"""Send the files that a request names to a server. `coppice.server.copies` describes the frames."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import msgspec

from coppice.agent import records
from coppice.agent.copy import read_chunks, with_thread
from coppice.agent.pack import content_bytes, pack
from coppice.agent.records import Entry
from coppice.agent.unpack import stays_inside
from coppice.client.remote.address import Address
from coppice.client.remote.copies import send_content
from coppice.client.remote.streams import Message, not_coppice, opened
from coppice.errors import CoppiceError, UsageError
from coppice.model import ProgressSink, Record
from coppice.model.progress import Meter
from coppice.requests import Request
from coppice.requests.base import paths_of

R = TypeVar("R", bound=Request[Any])
_CHUNK: Final = 1 << 18


class Upload(Record, frozen=True, kw_only=True):
    """The first frame of an upload."""

    operation: str
    name: str
    directory: bool
    tree: bool = True  # a directory is sent as records


@contextlib.asynccontextmanager
async def sent(address: Address, headers: Mapping[str, str], request: R, progress: ProgressSink) -> AsyncIterator[R]:
    """Send the files that a request names, and yield the request that names them on the server.

    The server keeps them until the end of the block. Errors in the block name the files of this
    machine.

    :raises UsageError: a file does not exist
    :raises NoSpace: the server has no disk space for them
    """
    paths = {name: path for name in paths_of(type(request)) if (path := getattr(request, name)) is not None}
    async with AsyncExitStack() as stack:
        tokens: dict[str, str] = {}
        for name, path in paths.items():
            sending = _sent(address, headers, request.operation, path, progress)
            tokens[name] = await stack.enter_async_context(sending)
        try:
            yield msgspec.structs.replace(request, **tokens) if tokens else request
        except CoppiceError as error:
            for name, token in tokens.items():
                error.reword(token, paths[name])
            raise


@contextlib.asynccontextmanager
async def _sent(
    address: Address, headers: Mapping[str, str], operation: str, path: str, progress: ProgressSink
) -> AsyncIterator[str]:
    """Send one file or directory, and yield its name on the server."""
    source = Path(path)
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give a path of this machine") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UsageError(f"{path} is not a file or directory", hint="write its content to a file first")
    if not source.name or source.name == "..":
        source = source.resolve()
    is_directory = stat.S_ISDIR(mode)
    first = Upload(operation=operation, name=source.name, directory=is_directory)

    def read(stream: BinaryIO) -> None:
        meter = Meter(progress, content_bytes(source.resolve()), "upload")
        if is_directory:
            records.write(pack(source.resolve(), source.name, moved=meter.moved, wanted=_stays), stream)
            return
        with source.open("rb") as content:
            while chunk := content.read(_CHUNK):
                stream.write(chunk)
                meter.moved(len(chunk))

    async with opened(address, headers, "/stream/upload", first) as connection:

        async def send(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> Message:
            return await send_content(connection, read_chunks(reader))

        answer, _ = await with_thread(send, read)
        if answer.upload is None:
            raise not_coppice()
        yield answer.upload


def _stays(entry: Entry) -> bool:
    """Return whether a server accepts an entry: a file, a directory, or a link that stays inside.

    Other entries are left out, as in the link `build` of a directory of kernel modules.
    """
    return entry.kind in ("f", "d", "h") or (entry.kind == "l" and stays_inside(entry.link, entry.path.count("/")))
