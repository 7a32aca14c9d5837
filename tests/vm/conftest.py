"""Real machines for the tests: one image and one warm template per test session; each test gets its machine by forking it.

COPPICE_TEST_HOME names a data directory to keep between runs, so that the image and the kernel are made once. Without it everything is made anew
in a temporary directory. A missing QEMU or mmdebstrap is a failure, never a skip.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from coppice.errors import NotFound
from coppice.host import AsyncHost
from coppice.model import Instance
from machines import GUEST_MEMORY, IMAGE, PACKAGES, WARM_SERVER, remove_all, warm_up


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """The data directory of the session."""
    kept = os.environ.get("COPPICE_TEST_HOME")
    if kept:
        yield Path(kept)
        return
    directory = Path(tempfile.mkdtemp(prefix="coppice-test-", dir="/var/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
async def host(home: Path) -> AsyncIterator[AsyncHost]:
    """One host for the session; at its end no instance is left, and so no VMM."""
    async with AsyncHost(home) as opened:
        await remove_all(opened)
        yield opened
        await remove_all(opened)
        assert not opened.rooms.driver.find_orphans(opened.rooms.layout.instances)
        assert list(opened.rooms.layout.instances.iterdir()) == []


@pytest.fixture(scope="session")
async def image(host: AsyncHost) -> str:
    """A Debian image with Python and numpy."""
    try:
        await host.image_inspect(IMAGE)
    except NotFound:
        await host.image_build(IMAGE, suite="bookworm", include=PACKAGES)
    return IMAGE


@pytest.fixture(scope="session")
async def template(host: AsyncHost, image: str) -> Instance:
    """A template with a warm Python: booted once, forked by nearly every test."""
    vm = await host.run(image, ["python3", "-c", WARM_SERVER], name="stump", memory_bytes=GUEST_MEMORY)
    await warm_up(host, vm)
    await host.standby(vm)
    return await host.promote(vm)


@pytest.fixture
async def vm(host: AsyncHost, template: Instance) -> AsyncIterator[Instance]:
    """A machine of its own for one test: a fork of the template."""
    async with host.forks(template, 1) as (fork,):
        yield fork
