"""Operations of a server over HTTP, repeated until the server has answered them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import ssl
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, Mapping
from typing import Final

import httpx
import msgspec
from httpx_sse import EventSource

from coppice.client.remote import patience
from coppice.client.remote.address import Address
from coppice.client.remote.failures import error_from, unreachable
from coppice.client.remote.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S
from coppice.client.remote.tracing import trace_headers
from coppice.completion import complete
from coppice.errors import CoppiceError, HostCannot, Overloaded
from coppice.model import Progress, ProgressSink
from coppice.model.events import Event
from coppice.requests import EventsRequest

_EVENTS: Final = "text/event-stream"
_OPERATION: Final = "coppice-operation"
# A server that works on a request sends a byte every 15 s.
_TIMEOUTS: Final = httpx.Timeout(10.0, read=60.0)
# Each call that lasts has a connection. The server bounds the number of its operations.
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=20)


class Calls:
    """The HTTP client of one server."""

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self._address = address
        verify = _trust(address)
        self.client = httpx.AsyncClient(
            base_url=address.url,
            headers=headers,
            timeout=_TIMEOUTS,
            limits=_LIMITS,
            verify=verify,
            transport=httpx.AsyncHTTPTransport(uds=address.socket, limits=_LIMITS, verify=verify)
            if address.socket
            else None,
        )

    async def check(self) -> None:
        """Check that the server answers.

        :raises HostCannot: it does not
        """
        try:
            (await self.client.get("/health")).raise_for_status()
        except httpx.HTTPError as error:
            raise unreachable(self._address, error) from error

    async def persist(self, path: str, content: bytes, progress: ProgressSink) -> bytes:
        """Send a request until the server has answered it. Return the result as JSON.

        The key of the request makes repetitions harmless: the server carries it out once.

        :raises HostCannot: the server has not answered for `patience.PERSIST_S`
        """
        headers = {
            "content-type": "application/json",
            "accept": f"{_EVENTS}, application/json",
            "idempotency-key": urlsafe_b64encode(os.urandom(18)).decode(),
            **trace_headers(),
        }
        failing_since: float | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._send(path, content, headers, progress)
            except _Repeat as error:
                now = time.monotonic()
                if failing_since is None or error.worked:
                    failing_since, pause_s = now, FIRST_PAUSE_S
                if now - failing_since >= patience.PERSIST_S:
                    raise error.reason from error.__cause__
                await asyncio.sleep(max(error.after_s, pause_s * random.uniform(0.5, 1)))  # noqa: S311 - no secret
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _send(self, path: str, content: bytes, headers: Mapping[str, str], progress: ProgressSink) -> bytes:
        """Send a request once. Return its result as JSON.

        :raises _Repeat: the server did not answer, or is overloaded
        """
        operation: str | None = None
        try:
            async with self.client.stream("POST", path, content=content, headers=headers) as response:
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
                    await complete(self.client.delete(f"/operations/{operation}"))
            raise

    async def events(self, request: EventsRequest) -> AsyncGenerator[Event, None]:
        """Yield events. Connect again after the last one if the connection was lost."""
        params: dict[str, str | int] = {"follow": "true" if request.follow else "false"}
        after = request.after if request.after is not None or request.follow else 0
        failing_since: float | None = None
        while True:
            where = params if after is None else params | {"after": after}
            try:
                async with self.client.stream("GET", "/events", params=where) as response:
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


def _trust(address: Address) -> ssl.SSLContext | bool:
    """Return what verifies the certificate of a server.

    An address without TLS has a context that trusts nobody: to load the authorities takes longer than
    the whole request.
    """
    return True if address.url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


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
