"""The work of `port-forward` and `connect`: pass bytes between this machine and servers in a guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final

from coppice.cli import output, terminal
from coppice.client.joining import Local
from coppice.completion import beside
from coppice.errors import CoppiceError, UsageError
from coppice.flow import CHUNK, joined, named, pass_on
from coppice.linux.files import address_errors
from coppice.requests import ConnectRequest, HealthRequest

if TYPE_CHECKING:
    from coppice.client.backend import Backend

_STDIN, _STDOUT = 0, 1
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing the socket breaks the connection


def check_address(address: str) -> None:
    """Check the address to listen on.

    :raises UsageError: it is not an IP address
    """
    from ipaddress import ip_address

    try:
        ip_address(address)
    except ValueError:
        raise UsageError(f"{address!r} is not an IP address", hint="write one such as 127.0.0.1 or ::1") from None


async def forward(
    host: Backend, name: str, wanted: Sequence[tuple[int | str, int]], address: str, *, as_json: bool
) -> None:
    """Forward ports until this task is cancelled.

    :param wanted: for each the server in the guest, and the port of this machine; 0: any
    :raises CoppiceError: the machine is not running, or a port cannot be used
    """
    requests = [ConnectRequest(instance=name, to=to) for to, _ in wanted]
    await host.call(HealthRequest(instance=name))  # fails now instead of at the first connection
    async with contextlib.AsyncExitStack() as stack:
        ports = [
            await stack.enter_async_context(_listening(_Forward(host, request), address, local))
            for request, (_, local) in zip(requests, wanted, strict=True)
        ]
        if as_json:
            rows = zip(requests, ports, strict=True)
            output.document({"forwards": [{"to": row.to, "address": address, "port": port} for row, port in rows]})
        else:
            shown = f"[{address}]" if ":" in address else address
            for request, port in zip(requests, ports, strict=True):
                output.line(f"{shown}:{port} -> {name} {named(request.to)}")
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _listening(forward: _Forward, address: str, port: int) -> AsyncIterator[int]:
    """Listen for a block, and yield the port. At its end, end all connections."""
    with address_errors(f"listen on port {port} of {address}", when_taken="write PORT:0 for any free port"):
        server = await asyncio.start_server(forward.accept, address, port, limit=CHUNK)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await forward.end()


class _Forward:
    """One server in the guest, and the connections to it."""

    def __init__(self, host: Backend, request: ConnectRequest) -> None:
        self._host = host
        self._request = request
        self._tasks: set[asyncio.Task[None]] = set()
        self._told = False  # that the server cannot be reached

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Begin to serve a client."""
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._host.stream(self._request) as connection:
                self._told = False
                await joined(Local(reader, writer), connection)
        except CoppiceError as error:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
            if not self._told:
                self._told = True
                output.complain("; ".join(part for part in (error.message, error.hint) if part))
        except OSError:
            pass  # the client has gone
        finally:
            writer.close()

    async def end(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Standard:
    """Standard input and output, as a connection."""

    async def receive(self) -> bytes:
        return await terminal.read(_STDIN)

    async def send(self, data: bytes) -> None:
        await terminal.write(_STDOUT, data)

    async def eof(self) -> None:
        output.discard()  # so that the reader sees the end, even if the input goes on


async def connect(host: Backend, name: str, to: int | str) -> None:
    """Pass standard input to a server in a guest, and its bytes to standard output.

    End when both directions have ended, or with the server's if a terminal is the input.

    :raises OutputClosed: the reader has closed standard output
    """
    request = ConnectRequest(instance=name, to=to)

    async def passing() -> None:
        async with host.stream(request) as connection:
            here = _Standard()
            if os.isatty(_STDIN):
                await beside(pass_on(here, connection), pass_on(connection, here))
            else:
                await joined(here, connection)

    await terminal.while_read(_STDOUT, passing())
