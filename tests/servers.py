"""Servers in the test's own loop, over fake machines."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from coppice import cli, host
from coppice.client import AsyncHost
from coppice.client.remote.backend import RemoteBackend
from coppice.host import LocalBackend
from coppice.server.app import make_app
from coppice.server.hosts import HostMaker
from coppice.server.serving import Listening, serve
from fakes.driver import FakeDriver
from fakes.rooms import DEADLINES, open_rooms

KEY = b"a key of the tests, which has 32 bytes or more"
START_S = 20.0
SILENT = "COPPICE_TEST_SILENT"
SERVER_START_S = 60.0
"""Longest start of a server process."""


def fake_hosts(home: Path, driver: FakeDriver) -> HostMaker:
    """Return a maker of hosts with fake machines."""

    def make(owner: str | None) -> LocalBackend:
        return LocalBackend(
            home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0, background="off", owner=owner
        )

    return make


@contextlib.asynccontextmanager
async def served(make_host: HostMaker, where: Listening, key: bytes | None, **options: Any) -> AsyncIterator[str]:
    """Serve for a block. Yield the server's address. `options` are those of `make_app`."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    ending = asyncio.Event()
    app = make_app(make_host, key, ending=ending, **options)
    task = asyncio.create_task(serve(app, where, ready=ready.set_result, ending=ending, signals=False))
    try:
        async with asyncio.timeout(START_S):
            waiting: set[asyncio.Future[Any]] = {ready, task}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        yield ready.result() if ready.done() else str(task.result())
    finally:
        ending.set()
        async with asyncio.timeout(START_S):
            await task


class ServedHost(AsyncHost):
    """A client of a server in this process, whose data directory tests may look into."""

    def __init__(self, address: str, opened: list[LocalBackend]) -> None:
        super().__init__(backend=RemoteBackend(address))
        self._opened = opened

    @property
    def local(self) -> LocalBackend:
        """The backend of the server."""
        return self._opened[0]


@contextlib.asynccontextmanager
async def served_hosts(home: Path, driver: FakeDriver, socket: Path) -> AsyncIterator[Callable[[], AsyncHost]]:
    """Serve a data directory for a block. Yield a maker of clients, which are the operator's."""
    opened: list[LocalBackend] = []

    def make(owner: str | None) -> LocalBackend:
        opened.append(fake_hosts(home, driver)(owner))
        return opened[-1]

    async with served(make, Listening(socket=socket), None) as address:
        yield lambda: ServedHost(address, opened)


def client_of(address: str) -> httpx.AsyncClient:
    """Return a plain HTTP client of a server on a unix socket."""
    transport = httpx.AsyncHTTPTransport(uds=address.removeprefix("unix:"))
    return httpx.AsyncClient(base_url="http://coppice", transport=transport, timeout=START_S)


def serve_command(home: str, listen: str, **options: Any) -> int:
    """Run `coppice serve` until a signal. Return its exit status.

    `listen` is as for the option `--listen`.

    `options` are those of hosts over machines of the tests. Nothing else differs from the command.
    """
    host.LocalBackend = functools.partial(LocalBackend, **options)  # type: ignore[misc, assignment]
    return cli.main(["--home", home, "serve", "--listen", listen, "--spares", "0"])


class Servers:
    """Server processes, one after another, over one data directory and one socket."""

    def __init__(self, arguments: list[str], channel: int) -> None:
        self._arguments = arguments
        self._channel = channel
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, hold: int = 0, variables: Mapping[str, str] = MappingProxyType({})) -> str:
        """Start a server; return its address. The `hold`th restored fork never gets ready.

        `variables` are added to its environment.
        """
        home, socket, *kind = self._arguments
        environment = {**os.environ, **variables} | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "api.serve_process", home, socket, str(hold), *kind),
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            pass_fds=[self._channel],
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(SERVER_START_S):
            return (await self._process.stdout.readline()).decode().split()[-1]

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status of the server; None while it runs."""
        assert self._process is not None
        return self._process.returncode

    @property
    def address(self) -> str:
        """The address of every server."""
        return self._arguments[1]

    async def end(self, number: signal.Signals) -> None:
        """End the server by a signal."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
            async with asyncio.timeout(SERVER_START_S):
                await self._process.wait()
