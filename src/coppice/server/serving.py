"""Listen on TCP or on a unix socket, and serve until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import uvicorn
from litestar.types import ASGIApp

from coppice.errors import InUse, Refused, UsageError
from coppice.linux.files import address_errors
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

    :raises Refused: the path of the socket is that of something else, which stays as it is
    :raises InUse: another server listens there
    :raises HostCannot: the address cannot be used
    """
    with _on_unix(where.socket, where.url) if where.socket else _on_tcp(where) as opened:
        yield opened


@contextlib.contextmanager
def _on_tcp(where: Listening) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in where.address else socket.AF_INET
    try:
        where.address.encode("idna")
    except UnicodeError as error:
        raise UsageError(
            f"{where.address[:80]!r} is not an address", hint="choose one of this host, such as 127.0.0.1"
        ) from error
    with address_errors(f"listen on {where.url}"):
        opened = socket.create_server((where.address, where.port), family=family, backlog=_BACKLOG)
    with opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # of each accepted connection
        yield opened


@contextlib.contextmanager
def _on_unix(path: Path, url: str) -> Iterator[socket.socket]:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as opened:
        with address_errors(f"listen on {url}"):
            _remove_stale(path)
            before = os.umask(0o177)
            try:
                opened.bind(str(path))
            finally:
                os.umask(before)
            own = os.open(path, os.O_PATH | os.O_NOFOLLOW)  # while it is open, no other file can have its inode
        try:
            with address_errors(f"listen on {url}"):
                opened.listen(_BACKLOG)
            yield opened
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(path.lstat(), os.fstat(own)):
                    path.unlink()
            os.close(own)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that has ended, if there is one at a path.

    :raises Refused: there is something else
    :raises InUse: a program listens on the socket
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise Refused(
            f"cannot listen on {path}: it exists, and is not a socket",
            hint="choose another path, or move this one away",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:  # any other error is an answer of a program that has the socket
            path.unlink()
            return
        except OSError:
            pass
    raise InUse(f"another server listens on {path}", hint="end it, or choose another socket")


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
