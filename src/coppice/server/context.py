"""What every handler uses: the server's hosts and operations, and the caller of the request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar, cast

import msgspec
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.handlers import BaseRouteHandler
from litestar.middleware import AbstractAuthenticationMiddleware, AuthenticationResult
from litestar.types import Scope

from coppice.errors import Forbidden, UsageError
from coppice.host import LocalBackend
from coppice.model import ProgressSink, no_progress
from coppice.requests import Request
from coppice.server.audit import Audit, target_of
from coppice.server.auth import Caller, read_token
from coppice.server.browsers import authorization_of, require_own_page
from coppice.server.ending import unless_ending
from coppice.server.hosts import Hosts
from coppice.server.keys import MOST_CHARACTERS
from coppice.server.metrics import Metrics
from coppice.server.once import Call, Once
from coppice.server.pulls import Pulls
from coppice.server.running import Operation, Operations
from coppice.server.tracing import Traces
from coppice.server.uploads import Uploads

R = TypeVar("R")
IDEMPOTENCY: Final = "idempotency-key"
REQUEST_ID: Final = "coppice_request_id"
"""Where the state of a connection has the id of its request."""
Connection: TypeAlias = ASGIConnection[Any, Caller, Any, Any]


@dataclass(frozen=True)
class Server:
    """The parts of one running server.

    `key` None: every caller is the operator. `ending` is set when the server is told to end.
    """

    hosts: Hosts
    operations: Operations
    once: Once
    uploads: Uploads
    key: bytes | None
    pulls: Pulls
    audit: Audit
    metrics: Metrics
    ending: asyncio.Event
    traces: Traces | None

    async def host(self, caller: Caller) -> LocalBackend:
        """Return the open host of the caller's owner."""
        return await self.hosts.of(caller.owner)

    async def begin(
        self, caller: Caller, request: Request[Any], turn: AbstractAsyncContextManager[None] | None = None
    ) -> Operation:
        """Begin an operation, or return the one that was begun with the caller's idempotency key.

        :param turn: entered for the time of the work; it may wait
        :raises KeyReused: the key was sent with another request
        :raises TooManyOperations: the caller's owner has too many running operations
        :raises Overloaded: all owners together have too many
        """
        host = await self.host(caller)

        async def work(progress: ProgressSink) -> Any:
            async with turn or contextlib.nullcontext():
                return await carry_out(progress)

        async def carry_out(progress: ProgressSink) -> Any:
            with self.observed(caller, host, request):
                if self.traces is not None:
                    progress = self.traces.forks(progress)
                if caller.key is not None:
                    return await self.once.carry_out(host, caller.key, request, progress)
                async with self.uploads.resolved(host.owner, request) as resolved:
                    result = await host.call(resolved, progress)
                self.metrics.made(result)
                return result

        if caller.key is not None:
            return self.once.begin(host, caller.key, request, work)
        return self.operations.start(request.operation, caller.owner, work)

    async def receive(self, caller: Caller, request: Request[R], call: Call) -> R:
        """Carry out an operation whose content is the body of the caller's request. It ends with that request, but
        the caller's idempotency key holds for it too: a repetition gets the first result.
        """
        host = await self.host(caller)

        async def work(progress: ProgressSink) -> Any:
            with self.observed(caller, host, request):
                if caller.key is None:
                    return await call()
                return await self.once.carry_out(host, caller.key, request, progress, call)

        if caller.key is not None:
            result: R = await self.once.begin(host, caller.key, request, work).result()
            return result
        return cast(R, await work(no_progress))

    async def begin_waiting(self, caller: Caller, request: Request[Any]) -> Operation:
        """Begin an operation that changes nothing, and that the client may have to wait long for.

        :raises TooManyOperations: the caller's owner has too many running operations
        :raises Overloaded: all owners together have too many
        """
        host = await self.host(caller)

        async def work(progress: ProgressSink) -> Any:
            return await unless_ending(host.call(request, progress), self.ending)

        return self.operations.start(request.operation, caller.owner, work)

    @contextlib.contextmanager
    def observed(self, caller: Caller, host: LocalBackend, request: Request[Any]) -> Iterator[None]:
        """Count the operation of a block, trace it, and record it in the audit log."""
        name, target = request.operation, target_of(request)
        span = contextlib.nullcontext() if self.traces is None else self.traces.operation(name, target)
        with self.audit.recorded(caller, host.owner, name, target), self.metrics.operation(name), span:
            yield

    async def carry_out(self, caller: Caller, request: Request[R]) -> R:
        """Carry out one operation. It goes on if the caller's connection is lost. Errors are those
        of `begin` and of the operation.
        """
        result: R = await (await self.begin(caller, request)).result()
        return result


TheServer: TypeAlias = NamedDependency[Server]
TheCaller: TypeAlias = NamedDependency[Caller]
"""Types of the parameters `server` and `caller` of handlers."""


class Authentication(AbstractAuthenticationMiddleware):
    """Finds the caller of each request from its token."""

    async def authenticate_request(self, connection: ASGIConnection[Any, Any, Any, Any]) -> AuthenticationResult:
        """Return the caller.

        :raises Unauthorized: the token is missing or not valid
        :raises Forbidden: the server has no tokens, and a page of another server made the request
        :raises UsageError: the idempotency key is not valid
        """
        key = server_of(connection.app.state).key
        if key is None:
            require_own_page(connection)
            caller = Caller()
        else:
            caller = read_token(key, authorization_of(connection))
        posts = connection.scope.get("method") == "POST"
        caller = msgspec.structs.replace(
            caller,
            key=_key_of(connection.headers.get(IDEMPOTENCY)) if posts else None,
            request_id=connection.scope["state"][REQUEST_ID],
            client=connection.client.host if connection.client else "",
        )
        return AuthenticationResult(user=caller, auth=None)


def _key_of(header: str | None) -> str | None:
    """Return a valid idempotency key, or None.

    :raises UsageError: it is empty or too long
    """
    if header is not None and not 0 < len(header) <= MOST_CHARACTERS:
        raise UsageError(
            f"the idempotency key has {len(header)} characters", hint=f"send 1 to {MOST_CHARACTERS}, such as a UUID"
        )
    return header


def server_of(state: State) -> Server:
    """Return the server from the application's state."""
    server: Server = state["server"]
    return server


async def provide_server(state: State) -> Server:
    """Provide the server to handlers."""
    return server_of(state)


async def provide_caller(scope: Scope) -> Caller:
    """Provide the caller to handlers."""
    caller: Caller = scope["user"]
    return caller


async def require_scope(connection: Connection, handler: BaseRouteHandler) -> None:
    """Guard: refuse a caller who lacks the handler's scope. Litestar runs a guard that is no coroutine in a thread.

    :raises Forbidden: the token lacks it
    """
    scope = handler.opt.get("scope")
    if scope is not None:
        require(connection.user, scope)


def require(caller: Caller, scope: str) -> None:
    """Refuse a caller who lacks a scope.

    :raises Forbidden: the token lacks it
    """
    if not caller.may(scope):
        raise Forbidden(f"missing required scope: {scope}", hint="make a token with that scope: `coppice token create`")
