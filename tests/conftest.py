"""What all tests can have: a compiled fake VMM, a data directory of their own, and hosts in it whose machines cost milliseconds.

At the end of a test nothing may be left: no process, no guest, and the database is closed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coppice.host import AsyncHost
from fakes.driver import PROGRAM, FakeDriver
from fakes.rooms import DEADLINES, make_seed, open_rooms, plant

pytest_plugins = ["machine_fixtures", "side_by_side"]


@pytest.fixture(scope="session")
def fake_vmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled fake VMM."""
    program = tmp_path_factory.mktemp("fake-vmm") / PROGRAM
    source = Path(__file__).parent / "fakes" / "fake_vmm.c"
    command = ["gcc", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return program


@pytest.fixture(scope="session")
async def seed_home() -> AsyncIterator[Path]:
    """A data directory with an image, never opened by a host: every test starts from a copy.

    In memory where that can be: thousands of small files are synced here, and what a real disk does to them is for other tests.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="coppice-", dir=memory if os.access(memory, os.W_OK) else None
    ) as directory:
        home = Path(directory) / "seed"
        await make_seed(home)
        yield home


@pytest.fixture
def fake_home(seed_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data directory for one test, beside the seed: links must reach. Nothing is hashed in the background unless the test wants it."""
    monkeypatch.setenv("COPPICE_HASHING", "off")
    home = Path(tempfile.mkdtemp(prefix="home-", dir=seed_home.parent)) / "home"
    plant(seed_home, home)
    yield home
    shutil.rmtree(home.parent)


@pytest.fixture
async def driver(fake_vmm: Path, fake_home: Path) -> AsyncIterator[FakeDriver]:
    """The fake driver; whatever it started is ended with the test."""
    driver = FakeDriver(fake_vmm)
    yield driver
    await driver.end(fake_home / "instances")


HostFactory = Callable[[], AsyncHost]


@pytest.fixture
def make_host(driver: FakeDriver, fake_home: Path) -> HostFactory:
    """Makes hosts, not yet opened, over the one data directory of the test."""

    def make() -> AsyncHost:
        return AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)

    return make


@pytest.fixture
async def fake_host(make_host: HostFactory) -> AsyncIterator[AsyncHost]:
    """An opened host whose machines are fake."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(make_host())
