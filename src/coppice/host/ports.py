"""The published ports of machines in automatic standby: the supervisor listens on them.

The first connection wakes the machine. It is accepted and kept until the machine runs, and then
passed on: the supervisor copies its bytes to the published port and back, as long as it lasts.
Whoever starts the machine first has the ports released, by the socket of the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from coppice.errors import HostCannot
from coppice.linux.files import address_errors
from coppice.model import ANY_PORT, Instance, Publish
from coppice.network.provider import reachable
from coppice.vmm import sockets

_log = logging.getLogger(__name__)
_BACKLOG: Final = 128
_MOST_KEPT: Final = 256  # connections of one machine that wait for it
_CHUNK: Final = 1 << 16
_RELEASE_S: Final = 5.0


def _socket_name(owner: str | None) -> str:
    return f"supervisor-{owner}.sock" if owner else "supervisor.sock"


async def release(home: Path, instance: Instance) -> None:
    """Have the supervisors of a data directory, if there are any, release the ports of a machine.

    :raises HostCannot: a supervisor did not answer in time
    """
    for name in {_socket_name(None), _socket_name(instance.owner)}:
        try:
            connection = sockets.connect(home, name)
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        connection.setblocking(False)
        try:
            async with asyncio.timeout(_RELEASE_S):
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(connection, f"{instance.id}\n".encode())
                await loop.sock_recv(connection, 1)  # its end
        except TimeoutError as error:
            raise HostCannot(
                f"the server does not release the ports of {instance.name}", hint="restart the server"
            ) from error
        finally:
            connection.close()


class Ports:
    """The ports that a supervisor holds."""

    def __init__(self, wake: Callable[[str], None]) -> None:
        """`wake` is called with the id of a machine at a connection, in the event loop."""
        self._wake = wake
        self._listening: dict[str, dict[Publish, socket.socket]] = {}
        self._kept: dict[str, list[tuple[Publish, socket.socket]]] = {}
        self._passing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def served(self, home: Path, owner: str | None) -> AsyncIterator[None]:
        """Release ports on request for a block. Release all at its end."""
        with sockets.listening(home, [_socket_name(owner)]) as opened:
            (listener,) = opened.values()
            listener.listen(_BACKLOG)
            server = await asyncio.start_unix_server(self._answer, sock=listener.dup())
            try:
                async with server:
                    yield
            finally:
                for key in {*self._listening, *self._kept}:
                    self.drop(key)
                for task in self._passing:
                    task.cancel()
                if self._passing:
                    await asyncio.wait(self._passing)
                (home / _socket_name(owner)).unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                self._release((await reader.readline()).decode().strip())
        writer.close()

    def hold(self, instance: Instance) -> None:
        """Listen on the TCP ports of a machine at rest. Idempotent.

        :raises InUse: another program uses one of them
        :raises HostCannot: an address is not this host's
        """
        wanted = {port for port in instance.publish if port.protocol == "tcp" and port.host_port != ANY_PORT}
        held = self._listening.setdefault(instance.id, {})
        for port in wanted - held.keys():
            family = socket.AF_INET6 if ":" in port.host_address else socket.AF_INET
            with address_errors(f"listen on {port.host_address}:{port.host_port} for {instance.name}"):
                listener = socket.create_server((port.host_address, port.host_port), family=family, backlog=_BACKLOG)
            listener.setblocking(False)
            held[port] = listener
            asyncio.get_running_loop().add_reader(listener, self._arrived, instance.id, port)

    def _arrived(self, key: str, port: Publish) -> None:
        listener = self._listening[key][port]
        kept = self._kept.setdefault(key, [])
        with contextlib.suppress(OSError):
            while len(kept) < _MOST_KEPT:
                kept.append((port, listener.accept()[0]))
        if len(kept) >= _MOST_KEPT:  # the others wait in the kernel
            asyncio.get_running_loop().remove_reader(listener)
        if kept:
            self._wake(key)

    def _release(self, key: str) -> None:
        """Stop to listen on the ports of a machine. Keep the connections that have arrived."""
        for port, listener in self._listening.pop(key, {}).items():
            self._listening.setdefault(key, {})[port] = listener
            asyncio.get_running_loop().remove_reader(listener)
            with contextlib.suppress(OSError):
                while True:
                    self._kept.setdefault(key, []).append((port, listener.accept()[0]))
            listener.close()
            self._listening[key].pop(port)
        self._listening.pop(key, None)

    def deliver(self, instance: Instance) -> None:
        """Pass the kept connections on to a machine that runs."""
        self._release(instance.id)
        for port, connection in self._kept.pop(instance.id, ()):
            task = asyncio.create_task(_pass_on(port, connection))
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)

    def drop(self, key: str) -> None:
        """Release the ports of a machine, and close the kept connections. Idempotent."""
        self._release(key)
        for _, connection in self._kept.pop(key, ()):
            connection.close()


async def _pass_on(port: Publish, connection: socket.socket) -> None:
    """Connect to a published port, and copy in both directions until both have ended."""
    connection.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        there = await asyncio.open_connection(reachable(port.host_address), port.host_port)
    except OSError as error:
        _log.info("cannot pass a connection on to port %d: %s", port.host_port, error)
        writer.close()
        return
    try:
        await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))
    except OSError:
        pass  # either end was reset
    finally:
        writer.close()
        there[1].close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        sink.write(data)
        await sink.drain()
    sink.write_eof()
