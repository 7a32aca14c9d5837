"""Fixtures of all tests with real machines: the data directory of this process, one host over it, and one image.

The image and the kernel are made once, in a data directory that all workers of a run link them from. COPPICE_TEST_HOME names one to keep between runs; without
it everything is made anew in a temporary directory. A missing QEMU or mmdebstrap is a failure, never a skip.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.errors import NotFound
from coppice.host import AsyncHost
from machines import IMAGE, PACKAGES, link_caches, remove_all

KEPT = "COPPICE_TEST_HOME"
_made = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the common directory where none is named: in the process that starts the workers, which inherit the variable."""
    if KEPT not in os.environ:
        config.stash[_made] = Path(tempfile.mkdtemp(prefix="coppice-test-", dir="/var/tmp"))
        os.environ[KEPT] = str(config.stash[_made])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it again."""
    if made := config.stash.get(_made, None):
        del os.environ[KEPT]
        shutil.rmtree(made)


@pytest.fixture(scope="session")
async def common_home() -> Path:
    """The common data directory, with the image and the kernel in it. Whoever needs it first makes it, and the others wait."""
    common = Path(os.environ[KEPT])
    workers = common / "workers"
    workers.mkdir(parents=True, exist_ok=True)
    lock = os.open(workers, os.O_RDONLY)  # not the data directory itself: hosts lock that
    try:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        async with AsyncHost(common) as host:
            await host.kernel_fetch()
            try:
                await host.image_inspect(IMAGE)
            except NotFound:
                await host.image_build(IMAGE, suite="bookworm", include=PACKAGES)
    finally:
        os.close(lock)
    return common


@pytest.fixture(scope="session")
def home(common_home: Path) -> Path:
    """The data directory of this process: two workers do not see each other's machines."""
    own = common_home / "workers" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
    link_caches(common_home, own)
    return own


@pytest.fixture(scope="session")
async def host(home: Path) -> AsyncIterator[AsyncHost]:
    """One host for the session; at its end no instance is left, and so no VMM. What a killed run has left goes first."""
    async with AsyncHost(home) as opened:
        await remove_all(opened)
        rooms = opened.rooms
        yield opened
        await remove_all(opened)
    assert not rooms.driver.find_orphans(rooms.layout.instances)
    assert list(rooms.layout.instances.iterdir()) == []


@pytest.fixture(scope="session")
async def image(host: AsyncHost) -> str:
    """A Debian image with Python and numpy."""
    return (await host.image_inspect(IMAGE)).name
