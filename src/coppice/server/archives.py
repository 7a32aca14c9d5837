"""Archives of templates: `GET /instances/{id}/export`, `POST /templates/import`, and the WebSocket
`/stream/import`.

The WebSocket is for clients that want to hear of a refusal before they have sent everything: the client
sends an OpenImportRequest, then binary frames and `{"eof": true}`. The server answers
`{"instance": {...}}`, or `{"error": {...}}` at any time.
"""

# No `from __future__ import annotations`: Litestar reads the annotations.

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from litestar import Request as HttpRequest
from litestar import get, post, websocket
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream

from coppice.errors import Busy
from coppice.host import LocalBackend
from coppice.model import Instance as Record
from coppice.requests import ImportTemplateRequest, OpenExportRequest, OpenImportRequest
from coppice.server.auth import Caller
from coppice.server.context import Server, TheCaller, TheServer
from coppice.server.copies import content_frames
from coppice.server.hypeman.paths import find
from coppice.server.hypeman.wire import Instance, instance_of
from coppice.server.streams import Socket, answering, first_frame, send
from coppice.server.table import scope_of

_TYPE: Final = "application/x-tar"
_BODY: Final = "body"  # names the content of the request where there is a path otherwise
_MOST_BYTES: Final = "coppice-most-bytes"
_DRAINED: Final = (
    64 << 20
)  # bytes of a refused archive that are read, since most clients read no answer before they have sent all

Bare = Annotated[bool, QueryParameter(description="Leave out the image and the kernel.")]
Name = Annotated[str | None, QueryParameter(description="Name of the template. Default: its name in the archive.")]


@get(
    "/instances/{key:str}/export",
    summary="Export a template as an archive.",
    tags=["instances"],
    opt={"scope": scope_of("export")},
    media_type=_TYPE,
    responses={200: ResponseSpec(bytes, description="A tar file.", media_type=_TYPE)},
)
async def instance_export(key: FromPath[str], server: TheServer, caller: TheCaller, bare: Bare = False) -> Stream:
    """Send the memory, device state, disk, image and kernel of a template or Standby instance.

    The connection breaks if a file cannot be read to its end.
    """
    host = await server.host(caller)
    found = await find(host, key)
    pieces = _pieces(server, caller, host, OpenExportRequest(instance=found.id, bare=bare))
    most_bytes = await anext(pieces)  # a refusal is raised here, before the answer begins
    return Stream(pieces, media_type=_TYPE, headers={_MOST_BYTES: most_bytes.decode()})


async def _pieces(
    server: Server, caller: Caller, host: LocalBackend, request: OpenExportRequest
) -> AsyncIterator[bytes]:
    """Yield the most bytes of an archive as text, then the archive."""
    with server.observed(caller, host, request):
        async with host.stream(request) as session:
            yield str(session.most_bytes).encode()
            async for piece in session:
                yield piece


@post(
    "/templates/import",
    summary="Import a template from an archive.",
    tags=["instances"],
    opt={"scope": scope_of("import_template")},
    request_max_body_size=None,
)
async def template_import(
    request: HttpRequest[Caller, Any, Any], server: TheServer, caller: TheCaller, name: Name = None
) -> Instance:
    """Make a template of the archive in the body. It exists only if the whole archive is valid."""
    host = await server.host(caller)
    digest, first = hashlib.sha256(), False
    body = request.stream() if caller.key is None else _digested(request.stream(), digest)

    async def receive() -> Record:
        nonlocal first
        first = True
        async with host.stream(OpenImportRequest(name=name)) as session:
            return await session.receive(_arriving(body))

    try:
        made = await server.receive(caller, ImportTemplateRequest(name=name, path=_BODY), receive)
    except BaseException:
        await _drain(body)
        raise
    if caller.key is None:
        await _drain(body)
    else:  # to its end: a repeated request has the same body
        async for _ in _arriving(body):
            pass
        await server.once.require_content(host.owner, caller.key, digest.hexdigest(), first=first)
    return instance_of(made)


async def _digested(body: AsyncIterator[bytes], digest: "hashlib._Hash") -> AsyncIterator[bytes]:
    async for chunk in body:
        digest.update(chunk)
        yield chunk


async def _arriving(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the body of a request.

    :raises Busy: the client went away; it can send the archive again with the same key
    """
    try:
        async for chunk in body:
            yield chunk
    except HTTPException as error:
        raise Busy("the client went away before the end of the archive", hint="send it again") from error


async def _drain(body: AsyncIterator[bytes]) -> None:
    left = _DRAINED
    with contextlib.suppress(Exception):  # the client went away
        async for chunk in body:
            left -= len(chunk)
            if left < 0:
                return


@websocket("/stream/import", opt={"scope": scope_of("import_template")})
async def stream_import(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Make a template of an archive. A client that goes away ends the import."""
    async with answering(socket):
        request = await first_frame(socket, OpenImportRequest)
        host = await server.host(caller)
        with server.observed(caller, host, request):
            async with host.stream(request) as session:
                made = await session.receive(content_frames(socket))
        await send(socket, instance=made)
