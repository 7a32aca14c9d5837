"""`GET /metrics` and `GET /audit`, and the middleware that counts requests and gives each an id."""

from __future__ import annotations

import logging
import re
import time
from typing import Annotated, Any, Final

from litestar import Response, get
from litestar.params import HeaderParameter, QueryParameter
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from coppice.errors import Forbidden
from coppice.model import Record
from coppice.names import new_id
from coppice.server.audit import Entry
from coppice.server.context import REQUEST_ID, TheCaller, TheServer
from coppice.server.logs import FIELDS
from coppice.server.metrics import Metrics

_log = logging.getLogger(__name__)
_HEADER: Final = b"x-request-id"
_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_STARTS: Final = {"http.response.start", "websocket.http.response.start", "websocket.accept"}
_SWITCHED: Final = 101  # the status of an accepted WebSocket

Limit = Annotated[int, QueryParameter(description="How many entries.", ge=1, le=1000)]
Accept = Annotated[str, HeaderParameter(name="accept", description="The format: text of Prometheus or OpenMetrics.")]


class AuditPage(Record, frozen=True, kw_only=True):
    """Entries of the audit log, newest first."""

    entries: list[Entry]


@get("/audit", summary="Read the audit log.", tags=["server"], opt={"scope": "resource:read"})
async def audit_get(server: TheServer, caller: TheCaller, limit: Limit = 100) -> AuditPage:
    """Return the newest entries of the caller's owner, or of all owners for the operator."""
    host = await server.host(caller)
    return AuditPage(entries=await server.audit.newest(host.owner, limit))


@get(
    "/metrics",
    summary="Metrics for Prometheus.",
    tags=["server"],
    opt={"scope": "resource:read"},
    media_type="text/plain",
)
async def metrics_get(server: TheServer, caller: TheCaller, accept: Accept = "") -> Response[bytes]:
    """Return metrics of all owners together. So only the operator may read them."""
    if caller.owner is not None:
        raise Forbidden("metrics are of all owners", hint="make a token without an owner: `coppice token create`")
    content, kind = await server.metrics.exposition(await server.host(caller), accept)
    return Response(content, media_type=kind)


class Observed:
    """ASGI middleware: give each request an id, which the answer repeats; count and log the answer.

    An id that the client sends in `x-request-id` is kept.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        kind: str = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        given = next((value for name, value in scope["headers"] if name == _HEADER and _ID.fullmatch(value)), b"")
        request_id = given or new_id().encode()
        scope.setdefault("state", {})[REQUEST_ID] = request_id.decode()

        async def sending(message: Message) -> None:
            found: dict[str, Any] = dict(message)
            if found["type"] in _STARTS:
                status = found.get("status", _SWITCHED)
                route = str(scope.get("path_template") or "none")
                method = scope.get("method", "WEBSOCKET")
                seconds = time.perf_counter() - begin
                self._metrics.answered(str(method), route, status, seconds)
                if _log.isEnabledFor(logging.INFO):
                    _log.info("request", extra={FIELDS: _line(scope, str(method), route, status, seconds)})
                found["headers"] = [*found.get("headers", []), (_HEADER, request_id)]
            await send(found)  # type: ignore[arg-type]  # a message with one more header

        await self._app(scope, receive, sending)


def _line(scope: Scope, method: str, route: str, status: int, seconds: float) -> dict[str, Any]:
    """Return the fields of a request's line. The route is the template of the path, which names no object."""
    caller, client = scope.get("user"), scope.get("client")
    return {
        "request_id": scope["state"][REQUEST_ID],
        "client": client[0] if client else "",
        "owner": getattr(caller, "owner", None),
        "method": method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
    }
