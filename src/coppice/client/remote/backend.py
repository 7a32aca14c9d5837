"""RemoteBackend: carries out requests on a server.

A command needs one way to the server: HTTP, or a WebSocket. The libraries of both take longer to import
than the request itself, so each is imported at its first use.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from coppice.client.remote.address import Address, parse_address
from coppice.client.remote.failures import encoded
from coppice.client.remote.health import check
from coppice.errors import MissingTool, NotSupported, UsageError
from coppice.model import ProgressSink, from_json, no_progress
from coppice.requests import Request, StreamRequest
from coppice.requests.base import paths_of, result_of

if TYPE_CHECKING:
    from coppice.client.remote.calls import Calls

R = TypeVar("R")
TOKEN_VARIABLE: Final = "COPPICE_TOKEN"  # noqa: S105 - the name of a variable
_STREAMS: Final = {
    "command_attach": "commands:attach",
    "connect": "connections:open_connection",
    "file_ls": "streams:open_items",
    "file_watch": "streams:open_items",
    "logs": "streams:open_logs",
    "open_copy": "copies:open_copy",
    "open_import": "archives:open_import",
}
"""The function that opens each stream over a WebSocket of its own."""
_TRANSFERS: Final = {
    "cp_in": "transfers:copy",
    "cp_out": "transfers:copy",
    "export": "transfers:export",
    "import_template": "transfers:import_template",
}
"""The function of each operation that reads or writes files of this machine through a stream."""


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
        self._calls: Calls | None = None
        self._is_open = False

    async def open(self) -> Self:
        """Check that the server answers.

        :raises HostCannot: it does not
        :raises MissingTool: this installation lacks the packages of the client
        """
        if not self._is_open:
            self._is_open = True
            try:
                if self._address.is_direct:
                    await check(self._address, self._headers)
                else:
                    await self._connected().check()
            except BaseException:
                await self.close()
                raise
        return self

    async def close(self) -> None:
        """Close all connections. Operations on the server go on. Idempotent."""
        calls, self._calls, self._is_open = self._calls, None, False
        if calls is not None:
            await calls.client.aclose()

    async def call(self, request: Request[R], progress: ProgressSink = no_progress) -> R:
        """Carry out one operation on the server. A cancellation cancels it there.

        Files of this machine that the request names are sent to the server first.

        :raises HostCannot: the server does not answer
        :raises MissingTool: this installation lacks the packages of the client
        """
        if place := _TRANSFERS.get(request.operation):
            return cast(R, await _function(place)(self, request, progress))
        async with contextlib.AsyncExitStack() as stack:
            ready = request
            if paths_of(type(request)):
                sending = _function("uploads:sent")(self._address, self._headers, request, progress)
                ready = await stack.enter_async_context(sending)
            body = await self._connected().persist(f"/call/{request.operation}", encoded(ready), progress)
        return cast(R, from_json(body, result_of(type(request))))

    def stream(self, request: StreamRequest[R]) -> AbstractAsyncContextManager[R]:
        """Open a running command or a log on the server."""
        opened: Any
        if request.operation == "events":
            opened = contextlib.aclosing(self._connected().events(cast(Any, request)))
        elif request.operation == "open_exec":
            opened = _function("commands:open_exec")(self._address, self._headers, request, self.call)
        elif request.operation == "open_export":
            opened = _function("archives:open_export")(self._address, self._connected().client, request)
        elif place := _STREAMS.get(request.operation):
            opened = _function(place)(self._address, self._headers, request)
        else:
            raise NotSupported(f"no server offers {request.operation}", hint="update Coppice")
        return cast(AbstractAsyncContextManager[R], opened)

    def _connected(self) -> Calls:
        """Return the HTTP client, made at its first use."""
        if not self._is_open:
            raise UsageError("the host is not open", hint="open it first: `with coppice.connect(ADDRESS) as host:`")
        if self._calls is None:
            self._calls = _function("calls:Calls")(self._address, self._headers)
        return cast("Calls", self._calls)


def _function(place: str) -> Any:
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(f"coppice.client.remote.{module}"), name)
    except ModuleNotFoundError as error:
        raise MissingTool(
            f"a connection to a server needs the package {error.name}", hint="run `pip install 'coppice-vm[remote]'`"
        ) from error
