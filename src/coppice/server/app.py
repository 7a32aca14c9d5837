"""The application: routes, authentication, errors and the OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from litestar import Litestar, Request, get
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.middleware.rate_limit import RateLimitConfig
from litestar.types import ASGIApp, Middleware

from coppice.completion import in_thread
from coppice.host.supervisor import Clock, Supervisor
from coppice.model import Record
from coppice.server import (
    archives,
    calls,
    connections,
    console,
    copies,
    document,
    events,
    files,
    observing,
    page,
    streams,
)
from coppice.server.audit import Audit
from coppice.server.auth import Caller
from coppice.server.bodies import JsonRequest
from coppice.server.context import Authentication, Server, provide_caller, provide_server, require_scope
from coppice.server.database import open_database
from coppice.server.denial import Denials, remember
from coppice.server.failures import respond
from coppice.server.hosts import HostMaker, Hosts
from coppice.server.hypeman import routes as hypeman
from coppice.server.hypeman.paths import EncodedSlashes
from coppice.server.metrics import Metrics
from coppice.server.observing import Observed
from coppice.server.once import Once
from coppice.server.pulls import Pulls
from coppice.server.running import Limits, Operations
from coppice.server.tracing import Traced, Traces
from coppice.server.uploads import Uploads

_LARGEST_BODY: Final = 64 << 20
_PUBLIC: Final = ["^/$", "^/assets/", "^/health$", "^/openapi"]


class Alive(Record, frozen=True, kw_only=True):
    """The answer of a server that runs."""

    status: str = "ok"


@get("/health", summary="Whether the server runs.", tags=["server"], security=document.PUBLIC)
async def health() -> Alive:
    """Answer without authentication."""
    return Alive()


def _owner_of(request: Request[Caller, Any, Any]) -> str:
    return request.user.owner or ""


def make_app(
    make_host: HostMaker,
    key: bytes | None,
    *,
    limits: Limits | None = None,
    per_minute: int | None = None,
    clock: Clock | None = None,
    ending: asyncio.Event | None = None,
    traces: Traces | None = None,
) -> ASGIApp:
    """Return the ASGI application.

    :param make_host: returns an unopened host for an owner, None for the operator
    :param key: the signing key of tokens; None: every caller is the operator
    :param limits: how many operations may run at once
    :param per_minute: how many requests each owner may make in a minute; None: any number
    :param clock: the time of day for the supervisor; None: this host's
    :param traces: where to send the spans of requests; None: there are none
    :param ending: when it is set, streams without an end of their own end
    """
    operations = Operations(limits or Limits())
    metrics = Metrics()
    uploads = Uploads()
    once = Once(operations, uploads, metrics.made)
    server = Server(
        Hosts(make_host), operations, once, uploads, key, Pulls(), Audit(), metrics, ending or asyncio.Event(), traces
    )
    middleware: list[Middleware] = [DefineMiddleware(Authentication, exclude=_PUBLIC)]
    if per_minute is not None:
        rate = RateLimitConfig(("minute", per_minute), exclude=_PUBLIC, identifier_for_request=_owner_of)
        middleware.append(rate.middleware)

    @asynccontextmanager
    async def running(app: Litestar) -> AsyncIterator[None]:
        app.state["server"] = server
        operator = await server.hosts.of(None)  # recovers interrupted operations before the first request
        database = await in_thread(open_database, operator.home)  # one connection: two would wait for each other
        server.once.open(database)
        server.audit.open(database)
        supervisor = asyncio.create_task(Supervisor(operator, clock).run(), name="supervisor")
        try:
            await server.uploads.open(operator.home)
            yield
        finally:
            supervisor.cancel()
            await asyncio.wait({supervisor})
            await server.operations.close()
            await server.audit.written()
            database.close()
            await server.hosts.close()
            if traces is not None:
                await traces.close()

    app = Litestar(
        route_handlers=document.documented(
            [
                health,
                *page.ROUTES,
                *calls.call_routes(),
                calls.tree_get,
                calls.operations_list,
                calls.operation_get,
                calls.operation_cancel,
                events.events_get,
                streams.stream_exec,
                streams.stream_attach,
                streams.stream_logs,
                observing.audit_get,
                observing.metrics_get,
                connections.stream_connect,
                copies.stream_copy,
                copies.stream_upload,
                files.stream_file_ls,
                files.stream_file_watch,
                archives.instance_export,
                archives.template_import,
                archives.stream_import,
                console.instance_console,
                *hypeman.ROUTES,
            ]
        ),
        lifespan=[running],
        dependencies={"server": Provide(provide_server), "caller": Provide(provide_caller)},
        middleware=middleware,
        guards=[require_scope],
        after_exception=[remember],
        exception_handlers={Exception: respond},
        logging_config=None,
        request_class=JsonRequest,
        request_max_body_size=_LARGEST_BODY,
        openapi_config=document.configuration(tokens=key is not None),
        plugins=document.plugins(),
    )
    observed: ASGIApp = Observed(Denials(app), metrics)
    return EncodedSlashes(observed if traces is None else Traced(observed, traces))
