"""WebSockets `/stream/file_ls` and `/stream/file_watch`: entries of a directory, and changes, as they come.

The client sends a FileLsRequest or FileWatchRequest. It gets one text frame for each entry,
`{"stat": {...}}`, or change, `{"event": {...}}`, then `{"end": true}`. Both can answer
`{"error": {...}, "errno": N}` at any time. Bytes of paths that are not UTF-8 are replaced by U+FFFD.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
from litestar import websocket

from coppice.completion import beside
from coppice.model import FileEvent, FileStat, as_utf8
from coppice.requests import FileLsRequest, FileWatchRequest, StreamRequest
from coppice.server.auth import Caller
from coppice.server.context import Server, TheCaller, TheServer
from coppice.server.copies import send_error
from coppice.server.streams import Socket, answering, first_frame, send, silence
from coppice.server.table import scope_of

_Kind = type[StreamRequest[AsyncIterator[FileStat]]] | type[StreamRequest[AsyncIterator[FileEvent]]]


@websocket("/stream/file_ls", opt={"scope": scope_of("file_ls")})
async def stream_file_ls(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Send the entries of a directory."""
    await _pass_on(socket, server, caller, FileLsRequest)


@websocket("/stream/file_watch", opt={"scope": scope_of("file_watch")})
async def stream_file_watch(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Send the changes of a path until the client goes away, or the path has."""
    await _pass_on(socket, server, caller, FileWatchRequest)


async def _pass_on(socket: Socket, server: Server, caller: Caller, kind: _Kind) -> None:
    async with answering(socket, report=send_error):
        request = await first_frame(socket, kind)
        host = await server.host(caller)

        async def sending() -> None:
            async with host.stream(request) as items:
                async for item in items:
                    await _send(socket, item)

        with server.observed(caller, host, request):
            await beside(silence(socket), sending())
        await send(socket, end=True)


async def _send(socket: Socket, item: FileStat | FileEvent) -> None:
    item = msgspec.structs.replace(item, path=as_utf8(item.path))
    if isinstance(item, FileEvent):
        await send(socket, event=item)
        return
    link = item.link_target
    await send(socket, stat=msgspec.structs.replace(item, link_target=None if link is None else as_utf8(link)))
