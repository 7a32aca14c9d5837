"""WebSocket `/instances/{id}/console`: the guest's console, as it is written.

The server sends the last lines as binary frames, then each new line, and closes when the machine
ends. It can end with a text frame `{"error": {...}}`. A console has no input: run a command instead.
"""

from __future__ import annotations

from typing import Annotated

from litestar import websocket
from litestar.params import FromPath, QueryParameter

from coppice.errors import CoppiceError
from coppice.requests import LogsRequest
from coppice.server.browsers import accept
from coppice.server.context import TheCaller, TheServer
from coppice.server.hypeman.paths import find
from coppice.server.streams import Socket, answering, send_lines
from coppice.server.table import scope_of

Tail = Annotated[int, QueryParameter(description="How many of the last lines to send first.", ge=0)]


@websocket("/instances/{key:str}/console", opt={"scope": scope_of("logs")})
async def instance_console(
    key: FromPath[str], socket: Socket, server: TheServer, caller: TheCaller, tail: Tail = 1000
) -> None:
    """Send the console of an instance."""
    host = await server.host(caller)
    found = await find(host, key)
    await accept(socket)
    async with answering(socket, CoppiceError):
        await send_lines(socket, host, LogsRequest(instance=found.id, tail=tail, follow=True), end=b"\n")
