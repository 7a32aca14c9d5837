"""Real machines for the tests: one warm template per test session; each test gets its machine by forking it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from coppice.host import AsyncHost
from coppice.model import Instance
from machines import GUEST_MEMORY, WARM_SERVER, warm_up


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
