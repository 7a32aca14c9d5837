"""RemoteBackend: carries out requests on a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Self, TypeVar, cast

import httpx
import msgspec
from httpx_sse import EventSource

from coppice.agent.copy import copy_in, copy_out
from coppice.archive.files import content_of, save
from coppice.client.remote import archives, commands, connections, copies, patience, streams, uploads
from coppice.client.remote.address import Address, parse_address
from coppice.client.remote.failures import encoded, error_from, unreachable
from coppice.client.remote.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S
from coppice.client.remote.tracing import trace_headers
from coppice.completion import complete
from coppice.errors import CoppiceError, HostCannot, NotSupported, Overloaded, UsageError
from coppice.model import Instance, Progress, ProgressSink, from_json, no_progress
from coppice.model.events import Event
from coppice.requests import (
    CommandAttachRequest,
    ConnectRequest,
    CpInRequest,
    CpOutRequest,
    EventsRequest,
    ExportRequest,
    FileLsRequest,
    FileWatchRequest,
    ImportTemplateRequest,
    LogsRequest,
    OpenCopyRequest,
    OpenExecRequest,
    OpenExportRequest,
    OpenImportRequest,
    Request,
    StreamRequest,
)
from coppice.requests.base import result_of

R = TypeVar("R")
TOKEN_VARIABLE: Final = "COPPICE_TOKEN"  # noqa: S105 - the name of a variable
_EVENTS: Final = "text/event-stream"
_OPERATION: Final = "coppice-operation"
# A server that works on a request sends a byte every 15 s.
_TIMEOUTS: Final = httpx.Timeout(10.0, read=60.0)
# Each call that lasts has a connection. The server bounds the number of its operations.
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=20)


class RemoteBackend:
    """One server."""

    def __init__(self, address: str, *, token: str | None = None) -> None:
        """`address` is as in `parse_address`. `token` defaults to COPPICE_TOKEN.

        :raises UsageError: the address or the token is malformed
        """
        self._address: Address = parse_address(address)
        token = token or os.environ.get(TOKEN_VARIABLE)
        if token and not (token.isascii() and token.isprintable()):
            raise UsageError("the token has characters that no token has", hint="copy it again, or make a new one")
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client: httpx.AsyncClient | None = None

    async def open(self) -> Self:
        """Check that the server answers.

        :raises HostCannot: it does not
        """
        if self._client is None:
            socket = self._address.socket
            self._client = httpx.AsyncClient(
                base_url=self._address.url,
                headers=self._headers,
                timeout=_TIMEOUTS,
                limits=_LIMITS,
                transport=httpx.AsyncHTTPTransport(uds=socket, limits=_LIMITS) if socket else None,
            )
            try:
                with self._reachable():
                    (await self._client.get("/health")).raise_for_status()
            except BaseException:
                await self.close()
                raise
        return self

    async def close(self) -> None:
        """Close all connections. Operations on the server go on. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def call(self, request: Request[R], progress: ProgressSink = no_progress) -> R:
        """Carry out one operation on the server. A cancellation cancels it there.

        Files of this machine that the request names are sent to the server first.

        :raises HostCannot: the server does not answer
        """
        if isinstance(request, CpInRequest | CpOutRequest):
            return cast(R, await self._copy(request, progress))
        if isinstance(request, ExportRequest | ImportTemplateRequest):
            return cast(R, await self._move(request, progress))
        async with uploads.sent(self._address, self._headers, request, progress) as ready:
            body = await self._persist(f"/call/{request.operation}", encoded(ready), progress)
        return cast(R, from_json(body, result_of(type(request))))

    async def _copy(self, request: CpInRequest | CpOutRequest, progress: ProgressSink) -> int:
        """Copy as an embedded host does, through a session that the server holds."""
        async with self.stream(OpenCopyRequest(instance=request.instance)) as session:
            if isinstance(request, CpInRequest):
                unpacked = await copy_in(
                    session, request.host_path, request.guest_path, keep_owners=request.keep_owners, progress=progress
                )
                return unpacked.content_bytes
            return await copy_out(
                session,
                request.guest_path,
                request.host_path,
                outside_links=request.outside_links,
                progress=progress,
            )

    async def _move(self, request: ExportRequest | ImportTemplateRequest, progress: ProgressSink) -> int | Instance:
        """Export to a file of this machine, or import one, through a stream of the server."""
        if isinstance(request, ExportRequest):
            async with self.stream(OpenExportRequest(instance=request.instance, bare=request.bare)) as exported:
                return await save(exported, request.path, progress)
        async with (
            self.stream(OpenImportRequest(name=request.name)) as session,
            contextlib.aclosing(content_of(request.path, progress)) as content,
        ):
            return await session.receive(content)

    async def _persist(self, path: str, content: bytes, progress: ProgressSink) -> bytes:
        """Send a request until the server has answered it. Return the result as JSON.

        The key of the request makes repetitions harmless: the server carries it out once.

        :raises HostCannot: the server has not answered for `patience.PERSIST_S`
        """
        headers = {
            "content-type": "application/json",
            "accept": f"{_EVENTS}, application/json",
            "idempotency-key": secrets.token_urlsafe(18),
            **trace_headers(),
        }
        client = self._connected()
        failing_since: float | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._send(client, path, content, headers, progress)
            except _Repeat as error:
                now = time.monotonic()
                if failing_since is None or error.worked:
                    failing_since, pause_s = now, FIRST_PAUSE_S
                if now - failing_since >= patience.PERSIST_S:
                    raise error.reason from error.__cause__
                await asyncio.sleep(max(error.after_s, pause_s * random.uniform(0.5, 1)))  # noqa: S311 - no secret
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _send(
        self, client: httpx.AsyncClient, path: str, content: bytes, headers: Mapping[str, str], progress: ProgressSink
    ) -> bytes:
        """Send a request once. Return its result as JSON.

        :raises _Repeat: the server did not answer, or is overloaded
        """
        operation: str | None = None
        try:
            async with client.stream("POST", path, content=content, headers=headers) as response:
                operation = response.headers.get(_OPERATION)
                if response.headers.get("content-type", "").startswith(_EVENTS):
                    return await _result_of_events(response, progress)
                body = await response.aread()
                if response.status_code >= 400:
                    raise _failure(response, body)
                return body
        except httpx.TransportError as error:
            raise _Repeat(unreachable(self._address, error), worked=operation is not None) from error
        except asyncio.CancelledError:
            if operation is not None:
                with contextlib.suppress(httpx.HTTPError):
                    await complete(client.delete(f"/operations/{operation}"))
            raise

    def stream(self, request: StreamRequest[R]) -> AbstractAsyncContextManager[R]:
        """Open a running command or a log on the server."""
        opened: AbstractAsyncContextManager[Any]
        if isinstance(request, OpenExecRequest):
            opened = commands.open_exec(self._address, self._headers, request, self.call)
        elif isinstance(request, CommandAttachRequest):
            opened = commands.attach(self._address, self._headers, request)
        elif isinstance(request, LogsRequest):
            opened = streams.open_logs(self._address, self._headers, request)
        elif isinstance(request, FileLsRequest):
            opened = streams.open_items(self._address, self._headers, request, lambda message: message.stat)
        elif isinstance(request, FileWatchRequest):
            opened = streams.open_items(self._address, self._headers, request, lambda message: message.event)
        elif isinstance(request, OpenCopyRequest):
            opened = copies.open_copy(self._address, self._headers, request)
        elif isinstance(request, OpenExportRequest):
            opened = archives.open_export(self._address, self._connected(), request)
        elif isinstance(request, OpenImportRequest):
            opened = archives.open_import(self._address, self._headers, request)
        elif isinstance(request, ConnectRequest):
            opened = connections.open_connection(self._address, self._headers, request)
        elif isinstance(request, EventsRequest):
            opened = contextlib.aclosing(self._events(request))
        else:
            raise NotSupported(f"no server offers {request.operation}", hint="update Coppice")
        return cast(AbstractAsyncContextManager[R], opened)

    async def _events(self, request: EventsRequest) -> AsyncGenerator[Event, None]:
        """Yield events. Connect again after the last one if the connection was lost."""
        client = self._connected()
        params: dict[str, str | int] = {"follow": "true" if request.follow else "false"}
        after = request.after if request.after is not None or request.follow else 0
        failing_since: float | None = None
        while True:
            where = params if after is None else params | {"after": after}
            try:
                async with client.stream("GET", "/events", params=where) as response:
                    if response.status_code >= 400:
                        raise error_from(await response.aread())
                    begins = response.headers.get("last-event-id", "")
                    if after is None and begins.isdecimal():
                        after = int(begins)  # also if the connection is lost before the first event
                    async for event in EventSource(response).aiter_sse():
                        if not event.data:
                            continue  # a comment that keeps the connection
                        found = msgspec.json.decode(event.data, type=Event)
                        after, failing_since = found.id, None
                        yield found
                if not request.follow:
                    return
                lost = HostCannot("the server ended the connection", hint="start it with `coppice serve`")
            except httpx.TransportError as error:
                lost = unreachable(self._address, error)
            failing_since = failing_since or time.monotonic()
            if time.monotonic() - failing_since >= patience.PERSIST_S:
                raise lost
            await asyncio.sleep(FIRST_PAUSE_S)

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            raise UsageError("the host is not open", hint="open it first: `with coppice.connect(ADDRESS) as host:`")
        return self._client

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        """Translate errors of the connection."""
        try:
            yield
        except httpx.HTTPError as error:
            raise unreachable(self._address, error) from error


class _Repeat(Exception):
    """The request has no answer yet and can be sent again. `reason` is the error if that is in vain."""

    def __init__(self, reason: CoppiceError, *, after_s: float = 0.0, worked: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = after_s
        self.worked = worked


async def _result_of_events(response: httpx.Response, progress: ProgressSink) -> bytes:
    """Pass on the progress of an operation. Return its result as JSON.

    Read to the end of the answer, so that the connection is used again for the next request.
    """
    result: bytes | None = None
    async for event in EventSource(response).aiter_sse():
        if event.event == "progress":
            progress(msgspec.json.decode(event.data, type=Progress))
        elif event.event == "error":
            error = error_from(event.data.encode())
            # A server that ends says so to those who wait, and its successor answers.
            raise _Repeat(error, worked=True) if isinstance(error, Overloaded) else error
        elif event.event == "result":
            result = event.data.encode()
    if result is not None:
        return result
    lost = HostCannot(
        "the server ended the connection before the operation ended", hint="`coppice ls` shows what it did"
    )
    raise _Repeat(lost, worked=True)


def _failure(response: httpx.Response, body: bytes) -> Exception:
    error = error_from(body)
    after = response.headers.get("retry-after", "")
    if response.status_code in (429, 503) and after.isdecimal():
        return _Repeat(error, after_s=float(after))
    return error
