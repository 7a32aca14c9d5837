"""Fixtures of all tests: a compiled fake VMM, a data directory per test, and hosts with fake
machines.

At the end of a test no process and no guest may be left, and the database must be closed.
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

from coppice.client import AsyncHost
from fakes.doubled import compile_double
from fakes.driver import PERSONALITIES, PERSONALITY, PROGRAM, FakeDriver
from fakes.rooms import DEADLINES, make_seed, open_rooms, plant

pytest_plugins = ["machine_fixtures", "registry_fixtures", "side_by_side"]


@pytest.fixture(scope="session")
def fake_vmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the fake VMM."""
    program = tmp_path_factory.mktemp("fake-vmm") / PROGRAM
    source = Path(__file__).parent / "fakes" / "fake_vmm.c"
    command = ["gcc", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
    subprocess.run(command, check=True, timeout=60)
    compile_double(program.parent)
    return program


@pytest.fixture(scope="session")
async def seed_home() -> AsyncIterator[Path]:
    """Make a data directory with an image; no host opens it. Every test starts from a copy.

    It is in memory if possible, because tests sync thousands of small files in it.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="coppice-", dir=memory if os.access(memory, os.W_OK) else None
    ) as directory:
        home = Path(directory) / "seed"
        await make_seed(home)
        yield home


@pytest.fixture(scope="session", params=PERSONALITIES)
def personality(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return where fake machines keep their RAM, also in child processes. Tests with fakes run with
    each personality.
    """
    os.environ[PERSONALITY] = request.param
    yield request.param
    del os.environ[PERSONALITY]


@pytest.fixture
def fake_home(seed_home: Path, personality: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a data directory for one test, on the seed's file system because of hard links.
    Background hashing is off.
    """
    monkeypatch.setenv("COPPICE_HASHING", "off")
    home = Path(tempfile.mkdtemp(prefix="home-", dir=seed_home.parent)) / "home"
    plant(seed_home, home)
    yield home
    shutil.rmtree(home.parent)


@pytest.fixture
async def driver(fake_vmm: Path, fake_home: Path) -> AsyncIterator[FakeDriver]:
    """Return the fake driver. Its processes are ended with the test."""
    driver = FakeDriver(fake_vmm)
    yield driver
    await driver.end(fake_home / "instances")


HostFactory = Callable[[], AsyncHost]


@pytest.fixture
def make_host(driver: FakeDriver, fake_home: Path) -> HostFactory:
    """Return a maker of unopened hosts over the test's data directory."""

    def make() -> AsyncHost:
        return AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)

    return make


@pytest.fixture
async def fake_host(make_host: HostFactory) -> AsyncIterator[AsyncHost]:
    """Return an opened host with fake machines."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(make_host())
