"""A server in the test's own loop, over fake machines, and clients of it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.client.connecting import connect_async
from coppice.server.auth import make_token
from coppice.server.serving import Listening
from fakes.driver import PERSONALITIES, PERSONALITY, FakeDriver
from fakes.keeping import keeping
from servers import KEY, Servers, fake_hosts, served


@pytest.fixture
def personality(monkeypatch: pytest.MonkeyPatch) -> str:
    """How fake machines keep their RAM. The server does not depend on it, so one kind is enough."""
    monkeypatch.setenv(PERSONALITY, PERSONALITIES[0])
    return PERSONALITIES[0]


@pytest.fixture
async def driver(fake_vmm: Path, fake_home: Path) -> AsyncIterator[FakeDriver]:
    """The fake driver under the name of a real one: clients know the names of VMMs."""
    driver = FakeDriver(fake_vmm, name="qemu")
    yield driver
    await driver.end(fake_home / "instances")


@pytest.fixture
async def socket_address(fake_home: Path, driver: FakeDriver, tmp_path: Path) -> AsyncIterator[str]:
    """The address of a server on a unix socket, which needs no token."""
    async with served(fake_hosts(fake_home, driver), Listening(socket=tmp_path / "coppice.sock"), None) as address:
        yield address


@pytest.fixture
async def tcp_address(fake_home: Path, driver: FakeDriver) -> AsyncIterator[str]:
    """The address of a server on TCP, which needs tokens signed with KEY."""
    async with served(fake_hosts(fake_home, driver), Listening(port=0), KEY) as address:
        yield address


@pytest.fixture(params=["embedded", "socket", "tcp"])
async def any_host(
    request: pytest.FixtureRequest, make_host: HostFactory, fake_home: Path, driver: FakeDriver, tmp_path: Path
) -> AsyncIterator[AsyncHost]:
    """A host whose requests this process carries out, or a server. Both behave alike."""
    async with AsyncExitStack() as stack:
        if request.param == "embedded":
            host = make_host()
        elif request.param == "socket":
            where = Listening(socket=tmp_path / "coppice.sock")
            host = connect_async(await stack.enter_async_context(served(fake_hosts(fake_home, driver), where, None)))
        else:
            address = await stack.enter_async_context(served(fake_hosts(fake_home, driver), Listening(port=0), KEY))
            host = connect_async(address, token=make_token(KEY, owner=None))
        yield await stack.enter_async_context(host)


@pytest.fixture
async def servers(fake_vmm: Path, fake_home: Path, driver: FakeDriver, tmp_path: Path) -> AsyncIterator[Servers]:
    """Servers that can be killed. Their machines' guests live in the test."""
    with keeping(driver) as channel:
        made = Servers([str(fake_home), f"unix:{tmp_path / 'server.sock'}", str(fake_vmm), str(channel)], channel)
        try:
            yield made
        finally:
            await made.end(signal.SIGKILL)


@pytest.fixture
async def tcp_servers(fake_vmm: Path, fake_home: Path, driver: FakeDriver) -> AsyncIterator[Servers]:
    """The same on TCP, where they need tokens."""
    with keeping(driver) as channel:
        made = Servers([str(fake_home), "127.0.0.1:0", str(fake_vmm), str(channel)], channel)
        try:
            yield made
        finally:
            await made.end(signal.SIGKILL)
