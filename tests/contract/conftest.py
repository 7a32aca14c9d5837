"""Contract tests whose requests a server carries out, besides those that run embedded.

The tests of the modules in `SERVED` run a second time, through `coppice.connect` and a server in
the test's own loop. They may look into the server's data directory by `host.local`, as they look
into their own. Other modules break the process that carries out a request, which here is the test,
or compare the whole data directory, in which a server has files of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.state.store import Store
from coppice.vmm.process import start_ticks
from fakes.clock import FakeClock
from fakes.driver import PERSONALITIES, FakeDriver
from fakes.rooms import DEADLINES, open_rooms, plant
from servers import served_hosts

SERVED = frozenset(
    {
        "test_archives",
        "test_connections",
        "test_error_tree",
        "test_fork_notices",
        "test_fork_payloads",
        "test_handles",
        "test_host_memory",
        "test_process_ends",
        "test_published_ports",
        "test_readiness",
        "test_shared_random",
        "test_trusted_certificates",
        "test_wrong_arguments",
    }
)
ALIKE = frozenset(
    {
        "test_auto_standby",
        "test_connections",
        "test_expiry",
        "test_health_checks",
        "test_host_memory",
        "test_hostile_archives",
        "test_restarts",
        "test_schedule_hazards",
        "test_snapshot_schedules",
        "test_traffic",
    }
)
"""Modules whose tests run with one kind of fake machines."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of `SERVED` that uses a host both ways."""
    if "carrier" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in SERVED:
        metafunc.parametrize("carrier", ["embedded", "served"], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Neither a server, nor a supervisor, nor a connection, nor the reader of archives depends on how
    fake machines keep their RAM: one kind is enough.
    """
    unwanted = [item for item in items if _is_repeated(item)]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item not in unwanted]


def _is_repeated(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    if call is None or (call.params.get("carrier") != "served" and item.path.stem not in ALIKE):
        return False
    return bool(call.params.get("personality", PERSONALITIES[0]) != PERSONALITIES[0])


@pytest.fixture
def carrier(request: pytest.FixtureRequest) -> str:
    """Who carries out the requests: this process (`embedded`), or a server (`served`)."""
    return str(getattr(request, "param", "embedded"))


@pytest.fixture
async def make_host(
    carrier: str, driver: FakeDriver, fake_home: Path, tmp_path: Path, make_host: HostFactory
) -> AsyncIterator[HostFactory]:
    """Return a maker of hosts over the test's data directory, or of clients of its server."""
    async with AsyncExitStack() as stack:
        if carrier == "served":
            yield await stack.enter_async_context(served_hosts(fake_home, driver, tmp_path / "coppice.sock"))
        else:
            yield make_host


@pytest.fixture
async def fake_host(make_host: HostFactory) -> AsyncIterator[AsyncHost]:
    """Return an opened host with fake machines."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(make_host())


@pytest.fixture
async def clock() -> FakeClock:
    """Return the time of a supervisor."""
    return FakeClock()


@pytest.fixture
async def other(make_host: HostFactory) -> AsyncIterator[AsyncHost]:
    """Return another host on the same data directory, as of another process."""
    async with make_host() as host:
        yield host


@pytest.fixture
async def elsewhere(carrier: str, seed_home: Path, driver: FakeDriver, tmp_path: Path) -> AsyncIterator[AsyncHost]:
    """Return a host over another data directory, whose VMM is the same."""
    home = Path(tempfile.mkdtemp(prefix="home-", dir=seed_home.parent)) / "home"
    plant(seed_home, home)
    try:
        async with AsyncExitStack() as stack:
            if carrier == "served":
                make_host = await stack.enter_async_context(served_hosts(home, driver, tmp_path / "elsewhere.sock"))
                yield await stack.enter_async_context(make_host())
            else:
                host = AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)
                yield await stack.enter_async_context(host)
        await driver.end(home / "instances")
    finally:
        shutil.rmtree(home.parent)


@pytest.fixture
def dead_store(fake_host: AsyncHost) -> Iterator[Store]:
    """The database as opened by a process that has died, which interrupts its operations."""
    process = subprocess.Popen(["sleep", "100"])
    ticks = start_ticks(process.pid)
    process.kill()
    process.wait()
    assert ticks is not None
    store = Store(fake_host.local.rooms.layout.database, (process.pid, ticks))
    yield store
    store.close()
