"""Connections to servers in guests, as streams of asyncio or as a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from coppice.errors import CoppiceError
from coppice.flow import CHUNK, pass_on
from coppice.model.guest import FLUSH_S, Connection

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connecting:
    """A connection to a server in a guest, for a block. Its ends are streams of asyncio:

    async with vm.connect(9222) as (reader, writer):
        writer.write(b"hello")
        writer.write_eof()
        print(await reader.read())

    Without asyncio it is a socket: `with vm.connect(9222) as sock`.
    """

    def __init__(self, opening: AbstractAsyncContextManager[Connection]) -> None:
        self._opening = opening
        self._streams = self._as_streams()

    async def __aenter__(self) -> Streams:
        return await self._streams.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._streams.__aexit__(kind, error, trace)

    @contextlib.asynccontextmanager
    async def as_socket(self) -> AsyncIterator[socket.socket]:
        """Yield a connected stream socket instead, for libraries that take one."""
        async with self._opening as connection, _joint(connection, lambda _: None) as sock:
            yield sock

    @contextlib.asynccontextmanager
    async def _as_streams(self) -> AsyncIterator[Streams]:
        reader = asyncio.StreamReader(CHUNK)
        async with self._opening as connection, _joint(connection, reader.set_exception) as sock:
            protocol = asyncio.StreamReaderProtocol(reader)
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_unix_connection(lambda: protocol, sock=sock)
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            try:
                yield reader, writer
                with contextlib.suppress(OSError, CoppiceError, TimeoutError):
                    async with asyncio.timeout(FLUSH_S):
                        writer.close()
                        await writer.wait_closed()
            finally:
                _abort(writer)


def _abort(writer: asyncio.StreamWriter) -> None:
    """End a transport now, unless it is ending already: a closed one must not be ended again."""
    if not writer.transport.is_closing():
        writer.transport.abort()


class Local:
    """The streams of a local connection, as a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> bytes:
        """Return the next bytes; nothing after their end."""
        return await self._reader.read(CHUNK)

    async def send(self, data: bytes) -> None:
        """Write bytes. Waits while the other end does not read."""
        self._writer.write(data)
        await self._writer.drain()

    async def eof(self) -> None:
        """End the direction to the other end."""
        self._writer.write_eof()


@contextlib.asynccontextmanager
async def _joint(connection: Connection, lost: Callable[[CoppiceError], None]) -> AsyncIterator[socket.socket]:
    """Yield a socket that is joined to a connection for a block.

    :param lost: called with the error of a lost connection, before the socket ends
    :raises CoppiceError: the connection was lost. This error replaces those of the socket
    """
    ours, theirs = socket.socketpair()
    failures: list[CoppiceError] = []
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        local = Local(reader, writer)
        sending = asyncio.create_task(pass_on(local, connection))
        receiving = asyncio.create_task(pass_on(connection, local))

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, CoppiceError):
                failures.append(error)
                lost(error)
            if error is not None or (sending.done() and receiving.done()):
                writer.close()

        for task in (sending, receiving):
            task.add_done_callback(ended)
        try:
            yield theirs
            receiving.cancel()
            with contextlib.suppress(OSError):  # it is closed already
                theirs.shutdown(socket.SHUT_RDWR)
            await asyncio.wait({sending}, timeout=FLUSH_S)
        except (OSError, EOFError) as error:
            if failures:
                raise failures[0] from error
            raise
        finally:
            for task in (sending, receiving):
                task.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)
            _abort(writer)
    if failures:
        raise failures[0]
