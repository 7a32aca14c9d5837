"""Fixtures of all tests with real machines: the data directory of the session, one host over it, and one image.

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
from machines import IMAGE, PACKAGES, remove_all


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
        rooms = opened.rooms
        yield opened
        await remove_all(opened)
    assert not rooms.driver.find_orphans(rooms.layout.instances)
    assert list(rooms.layout.instances.iterdir()) == []


@pytest.fixture(scope="session")
async def image(host: AsyncHost) -> str:
    """A Debian image with Python and numpy."""
    try:
        await host.image_inspect(IMAGE)
    except NotFound:
        await host.image_build(IMAGE, suite="bookworm", include=PACKAGES)
    return IMAGE
