"""Archives of templates from and to a server. `coppice.server.archives` describes the routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Final
from urllib.parse import quote

import httpx
from websockets.asyncio.client import ClientConnection

from coppice.client.remote.address import Address
from coppice.client.remote.copies import send_content
from coppice.client.remote.failures import error_from, unreachable
from coppice.client.remote.streams import not_coppice, opened
from coppice.errors import HostCannot
from coppice.model import Instance
from coppice.requests import OpenExportRequest, OpenImportRequest

# A server sends nothing while it computes the digest of a hole: 0.6 s for each GiB.
_TIMEOUTS: Final = httpx.Timeout(10.0, read=900.0)


class RemoteExport:
    """An archive that a server sends."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        size = response.headers.get("coppice-most-bytes", "")
        self.most_bytes = int(size) if size.isdecimal() else 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the archive.

        :raises HostCannot: the connection was lost, or the server could not read all of the archive
        """
        try:
            async for chunk in self._response.aiter_raw():
                yield chunk
        except httpx.TransportError as error:
            raise HostCannot(
                f"the server did not send the whole archive: {error}",
                hint="try again; the server's log says why, and `coppice verify` there finds changed files",
            ) from error


@contextlib.asynccontextmanager
async def open_export(
    address: Address, client: httpx.AsyncClient, request: OpenExportRequest
) -> AsyncIterator[RemoteExport]:
    """Open the archive of an instance of the server."""
    path = f"/instances/{quote(request.instance, safe='')}/export"
    try:
        params = {"bare": str(request.bare).lower()}
        async with client.stream("GET", path, params=params, timeout=_TIMEOUTS) as response:
            if response.status_code >= 400:
                raise error_from(await response.aread())
            yield RemoteExport(response)
    except httpx.TransportError as error:
        raise unreachable(address, error) from error


class RemoteImport:
    """A template that a server makes of an archive."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def receive(self, archive: AsyncIterable[bytes]) -> Instance:
        """Send an archive, and return the template. A refusal of the server ends the sending."""
        answer = await send_content(self._connection, archive)
        if answer.instance is None:
            raise not_coppice()
        return answer.instance


@contextlib.asynccontextmanager
async def open_import(
    address: Address, headers: Mapping[str, str], request: OpenImportRequest
) -> AsyncIterator[RemoteImport]:
    """Open a session of the server that takes an archive. Leaving the block ends it."""
    async with opened(address, headers, "/stream/import", request) as connection:
        yield RemoteImport(connection)
