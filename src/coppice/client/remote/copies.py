"""A copy session with a guest of a server. `coppice.server.copies` describes the frames."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Final

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from coppice.client.remote.address import Address
from coppice.client.remote.failures import encoded
from coppice.client.remote.streams import Message, message_of, next_frame, not_coppice, opened
from coppice.completion import beside
from coppice.model import FileStat
from coppice.model.guest import Source, Unpacked
from coppice.requests import OpenCopyRequest

_FRAME: Final = 1 << 18  # bytes; a server accepts 1 MiB


class RemoteCopySession:
    """A session that a server holds."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def stat(self, path: str, *, follow: bool = False) -> FileStat:
        """Return the status of a path; of a link itself unless `follow`.

        :raises GuestRefused: the path does not exist (`errno` ENOENT)
        """
        await self._ask(stat={"path": path, "follow": follow})
        answer = await message_of(self._connection)
        if answer.stat is None:
            raise not_coppice()
        return answer.stat

    async def tree_in(self, directory: str, records: Source) -> Unpacked:
        """Make a tree below a directory.

        :raises GuestRefused: an entry cannot be made; the entries before it remain
        """
        await self._ask(tree_in=directory)
        answer = await send_content(self._connection, records)
        if answer.unpacked is None:
            raise not_coppice()
        return answer.unpacked

    async def tree_out(self, path: str, *, contents: bool = False) -> AsyncIterator[bytes]:
        """Yield the records of a file or tree, which is not trustworthy.

        :param contents: pack the entries of the directory instead of the directory itself
        :raises GuestRefused: the path cannot be read
        """
        await self._ask(tree_out={"path": path, "contents": contents})
        while isinstance(frame := await next_frame(self._connection), bytes):
            yield frame

    async def _ask(self, **step: object) -> None:
        message = encoded(step).decode()
        with contextlib.suppress(ConnectionClosed):  # the reader reports the lost connection
            await self._connection.send(message)


async def send_content(connection: ClientConnection, content: Source) -> Message:
    """Send content and its end. Return the answer. An error that the server reports ends the sending.

    :raises CoppiceError: the server reports an error, or the connection was lost
    """

    async def sending() -> None:
        with contextlib.suppress(ConnectionClosed):  # the reader reports the lost connection
            async for chunk in _frames(content):
                await connection.send(chunk)
            await connection.send('{"eof": true}')

    return await beside(sending(), message_of(connection))


async def _frames(content: Source) -> AsyncIterator[bytes]:
    if isinstance(content, AsyncIterable):
        async for chunk in content:
            yield chunk
    else:
        for at in range(0, len(content), _FRAME):
            yield content[at : at + _FRAME]


@contextlib.asynccontextmanager
async def open_copy(
    address: Address, headers: Mapping[str, str], request: OpenCopyRequest
) -> AsyncIterator[RemoteCopySession]:
    """Open a copy session on the server. Leaving the block ends the copy."""
    async with opened(address, headers, "/stream/copy", request) as connection:
        await message_of(connection)
        yield RemoteCopySession(connection)
