"""Fixtures of all tests with real machines: the data directory of this process, one host over it,
and one image.

The image and the kernel are made once, in a data directory from which all workers of a run link
them. COPPICE_TEST_HOME names one to keep between runs; without it everything is made in a new
temporary directory. A missing QEMU or mmdebstrap is a failure, never a skip.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import NotFound
from coppice.network import PREFERRED
from machines import IMAGE, PACKAGES, RUNTIME_PACKAGES, RUNTIMES, link_caches, link_image, remove_all
from platforms import EMULATED, Platform, platforms
from remains import machines_ended

KEPT = "COPPICE_TEST_HOME"
_made = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the common directory unless one is named, in the process whose workers inherit the
    variable.

    Machines that name no network get user mode, which leaves this host's own network alone.
    """
    os.environ.setdefault(PREFERRED, "user")
    if KEPT not in os.environ:
        config.stash[_made] = Path(tempfile.mkdtemp(prefix="coppice-test-", dir="/var/tmp"))
        os.environ[KEPT] = str(config.stash[_made])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the directory that pytest_configure made."""
    if made := config.stash.get(_made, None):
        del os.environ[KEPT]
        shutil.rmtree(made)


@pytest.fixture(scope="session")
async def common_home() -> Path:
    """Return the common data directory with the image and kernel. The first worker makes it; the
    others wait.
    """
    common = Path(os.environ[KEPT])
    (common / "workers").mkdir(parents=True, exist_ok=True)
    await _ensure_image(common, IMAGE, PACKAGES)
    return common


async def _ensure_image(common: Path, name: str, packages: tuple[str, ...]) -> None:
    lock = os.open(common / "workers", os.O_RDONLY)  # hosts lock the data directory itself
    try:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        async with AsyncHost(common) as host:
            await host.kernels.fetch()
            try:
                await host.images.inspect(name)
            except NotFound:
                await host.images.build(name, suite="bookworm", include=packages)
    finally:
        os.close(lock)


@pytest.fixture(scope="session", params=platforms())
def platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    """Return the platform that runs the machines, in this process and in those that it starts."""
    chosen: Platform = getattr(request, "param", EMULATED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPPICE_ACCEL", chosen.accel)
        yield chosen


@pytest.fixture(scope="session")
def home(common_home: Path, platform: Platform) -> Path:
    """Return the data directory of this worker process, so that workers do not see each other's
    machines.
    """
    own = common_home / "workers" / platform.name / os.environ.get("PYTEST_XDIST_WORKER", "alone")
    link_caches(common_home, own)
    platform.place_kernel(own / "kernels")
    return own


@pytest.fixture(scope="session")
async def host(home: Path, platform: Platform) -> AsyncIterator[AsyncHost]:
    """Return one host for the session. It removes the instances of a killed run first, and its own
    at the end.
    """
    with machines_ended(home):
        async with platform.host(home) as opened:
            await remove_all(opened)
            rooms = opened.local.rooms
            yield opened
            await remove_all(opened)
    assert not rooms.drivers.chosen.find_orphans(rooms.layout.instances)
    assert list(rooms.layout.instances.iterdir()) == []


@pytest.fixture(scope="session")
async def image(host: AsyncHost) -> str:
    """Return a Debian image with Python and numpy."""
    return (await host.images.inspect(IMAGE)).name


@pytest.fixture(scope="session")
async def runtimes(common_home: Path, home: Path, host: AsyncHost) -> str:
    """An image with Node.js, Python, nginx, OpenSSL, PostgreSQL and Chromium, made for the first test that
    wants it.
    """
    await _ensure_image(common_home, RUNTIMES, RUNTIME_PACKAGES)
    await asyncio.to_thread(link_image, common_home, home, RUNTIMES)
    return (await host.images.inspect(RUNTIMES)).name
