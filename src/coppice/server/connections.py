"""WebSocket `/stream/connect`: a stream of bytes to a server in a guest.

The client sends a ConnectRequest as a JSON text frame, and gets `{}` when the connection is open. Then
both sides send frames of `coppice.flow`: binary frames are bytes, `{"eof": true}` ends one direction,
and `{"window": N}` allows N more bytes beyond the first 262144. This server closes the WebSocket when
both directions have ended, or after `{"error": {...}, "errno": N}` when the connection was refused or
lost.
"""

from __future__ import annotations

import msgspec
from litestar import websocket
from litestar.exceptions import WebSocketDisconnect

from coppice.completion import beside
from coppice.flow import Flow, joined
from coppice.host import LocalBackend
from coppice.requests import ConnectRequest
from coppice.server.context import TheCaller, TheServer
from coppice.server.copies import send_error
from coppice.server.streams import Socket, answering, decoded, first_frame, frame_from, send
from coppice.server.table import scope_of


class Control(msgspec.Struct, forbid_unknown_fields=True):
    """A text frame of a client."""

    window: int = 0
    eof: bool = False


@websocket("/stream/connect", opt={"scope": scope_of("connect")})
async def stream_connect(socket: Socket, server: TheServer, caller: TheCaller) -> None:
    """Pass bytes on. A client that goes away ends the connection."""
    async with answering(socket, report=send_error):
        request = await first_frame(socket, ConnectRequest)
        host = await server.host(caller)
        with server.observed(caller, host, request):
            await _connect(socket, host, request)


async def _connect(socket: Socket, host: LocalBackend, request: ConnectRequest) -> None:
    async def put(frame: bytes | str) -> None:
        await (socket.send_bytes(frame) if isinstance(frame, bytes) else socket.send_text(frame))

    async def get() -> bytes | Control:
        frame = await frame_from(socket)
        if isinstance(frame, bytes):
            return frame
        control: Control = decoded(frame, Control, "a text frame is not valid")
        return control

    client = Flow(put, get)

    async def watch() -> None:
        await client.read()
        await client.taken()
        if client.failure:
            raise client.failure

    gone: WebSocketDisconnect | None = None
    async with host.stream(request) as connection:
        await send(socket)
        try:
            await beside(watch(), joined(client, connection))
        except WebSocketDisconnect as error:
            gone = error  # the guest still gets what the client has sent
    if gone is not None:
        raise gone
