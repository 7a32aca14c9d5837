"""Listen on TCP or on a unix socket, and serve until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import uvicorn
from litestar.types import ASGIApp

from coppice.errors import InUse, UsageError
from coppice.linux.files import os_errors
from coppice.model import Record

_BACKLOG: Final = 1024
_GRACE_S: Final = 10  # for requests under way at shutdown
_LARGEST_MESSAGE: Final = 1 << 20  # of a WebSocket
_CONNECTIONS: Final = 4096
# A client that pauses, as behind a pager, answers no ping and keeps its connection. That a client is
# gone is seen when TCP gives up on the bytes of a ping.
_PING_S: Final = 20.0
_ENDING: Final = (signal.SIGINT, signal.SIGTERM)
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class Listening(Record, frozen=True, kw_only=True):
    """Where a server listens: on a unix socket, or on TCP."""

    socket: Path | None = None
    address: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        """The address for the option `--host`."""
        if self.socket is not None:
            return f"unix:{self.socket}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http{'s' if self.certificate else ''}://{host}:{self.port}"


@contextlib.contextmanager
def listen(where: Listening) -> Iterator[socket.socket]:
    """Open the listening socket for a block. Only this user can connect to a unix socket.

    :raises InUse: another server listens there
    :raises HostCannot: the address cannot be used
    """
    action = f"listen on {where.url}"
    if where.socket is None:
        family = socket.AF_INET6 if ":" in where.address else socket.AF_INET
        with (
            _translated(action),
            socket.create_server((where.address, where.port), family=family, backlog=_BACKLOG) as opened,
        ):
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # of each accepted connection
            yield opened
        return
    if where.socket.is_socket() and _answers(where.socket):
        raise InUse(f"another server listens on {where.socket}", hint="end it, or choose another socket")
    with os_errors(action):
        where.socket.unlink(missing_ok=True)
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            opened.bind(str(where.socket))
        finally:
            os.umask(before)
        opened.listen(_BACKLOG)
    try:
        yield opened
    finally:
        opened.close()
        where.socket.unlink(missing_ok=True)


@contextlib.contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InUse(f"cannot {action}: the address is in use", hint="choose another with --port") from error
        raise


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


async def serve(
    app: ASGIApp, where: Listening, *, ready: Callable[[str], None], ending: asyncio.Event, signals: bool = True
) -> None:
    """Serve until `ending` is set. Then finish the requests under way; machines keep running.

    :param ready: called with the server's address when it listens
    :param ending: that of the application
    :param signals: SIGINT and SIGTERM set `ending`; at the second, do not wait for the requests
    :raises UsageError: a certificate without its key
    """
    if (where.certificate is None) != (where.key is None):
        raise UsageError("TLS needs a certificate and its key", hint="give both --tls-cert and --tls-key")
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws_max_size=_LARGEST_MESSAGE,
        ws_ping_interval=_PING_S,
        ws_ping_timeout=None,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=where.certificate,
        ssl_keyfile=where.key,
    )
    with listen(where) as opened:
        if where.socket is None:
            where = msgspec.structs.replace(where, port=opened.getsockname()[1])
        server = _Server(config, lambda: ready(where.url), ending, _ENDING if signals else ())
        await server.serve(sockets=[opened])


class _Server(uvicorn.Server):
    """uvicorn's server, with a callback when it listens. A signal ends it without an exception."""

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], None],
        ending: asyncio.Event,
        signals: Sequence[signal.Signals],
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._ending = ending
        self._signals = signals

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at the first signal; at the second, without waiting for requests under way."""
        loop = asyncio.get_running_loop()

        def end(number: signal.Signals) -> None:
            self.handle_exit(number, None)
            self._ending.set()

        waiting = loop.create_task(self._ending.wait())
        waiting.add_done_callback(lambda _: setattr(self, "should_exit", True))
        for number in self._signals:
            loop.add_signal_handler(number, end, number)
        try:
            yield
        finally:
            waiting.cancel()
            for number in self._signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `ready`."""
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()
