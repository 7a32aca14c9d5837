"""Connections to servers in guests of a host's server. `coppice.server.connections` describes the frames."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from coppice.client.remote.address import Address
from coppice.client.remote.streams import Message, message_of, next_frame, opened
from coppice.errors import HostCannot
from coppice.flow import Flow, closed
from coppice.requests import ConnectRequest


class RemoteConnection(Flow):
    """A connection that a host's server holds."""

    def __init__(self, connection: ClientConnection, to: int | str) -> None:
        async def put(frame: bytes | str) -> None:
            with contextlib.suppress(ConnectionClosed):  # the reader reports the lost connection
                await connection.send(frame)

        async def get() -> bytes | Message:
            return await next_frame(connection)

        super().__init__(put, get)
        self._to = to

    async def send(self, data: bytes) -> None:
        """Send bytes, within the window.

        :raises GuestRefused: the server in the guest has closed the connection (`errno` EPIPE)
        :raises HostCannot: the connection to the host's server was lost
        """
        try:
            await super().send(data)
        except HostCannot as error:
            if not self.received_all:
                raise
            raise closed(self._to) from error


@contextlib.asynccontextmanager
async def open_connection(
    address: Address, headers: Mapping[str, str], request: ConnectRequest
) -> AsyncIterator[RemoteConnection]:
    """Connect on the server. Leaving the block closes the connection."""
    async with opened(address, headers, "/stream/connect", request) as socket:
        await message_of(socket)
        connection = RemoteConnection(socket, request.to)
        reading = asyncio.create_task(connection.read())
        try:
            yield connection
            await connection.flush()
        finally:
            reading.cancel()
            await asyncio.wait({reading})
