"""Refuse a WebSocket before it is accepted with the same status and body as any other request."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from coppice.errors import Forbidden
from coppice.server.context import Server
from coppice.server.failures import failure_of

_ERROR: Final = "coppice_error"
_EXTENSION: Final = "websocket.http.response"


async def remember(error: Exception, scope: Scope) -> None:
    """Hook of the application: keep the error of a request for `Denials`, and record in the audit
    log that a known caller may not do what it asked for.
    """
    scope["state"][_ERROR] = error
    if isinstance(error, Forbidden) and "user" in scope:  # else the caller was refused before it was known
        server: Server = scope["litestar_app"].state["server"]
        server.audit.refused(scope["user"], f"{scope.get('method', 'WEBSOCKET')} {scope['path_template']}", error)


class Denials:
    """ASGI middleware: answer a refused WebSocket with HTTP (an extension of ASGI 2.4)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on."""
        if scope["type"] != ScopeType.WEBSOCKET or _EXTENSION not in (scope.get("extensions") or {}):
            await self._app(scope, receive, send)
            return
        accepted = False

        async def sending(message: Message) -> None:
            nonlocal accepted
            accepted = accepted or message["type"] == "websocket.accept"
            error = scope.get("state", {}).get(_ERROR)
            if message["type"] == "websocket.close" and not accepted and isinstance(error, Exception):
                await _respond(send, error)
            else:
                await send(message)

        await self._app(scope, receive, sending)


async def _respond(send: Send, error: Exception) -> None:
    status, failure = failure_of(error)
    headers = [(b"content-type", b"application/json"), (b"x-should-retry", b"false")]
    start: dict[str, Any] = {"type": f"{_EXTENSION}.start", "status": status, "headers": headers}
    body: dict[str, Any] = {"type": f"{_EXTENSION}.body", "body": msgspec.json.encode(failure)}
    await send(start)  # type: ignore[arg-type]  # an extension
    await send(body)  # type: ignore[arg-type]
