"""Real machines for the tests: each test forks one warm template per session."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance
from coppice.requests import PromoteRequest, RunRequest, StandbyRequest
from machines import GUEST_MEMORY, WARM_SERVER, warm_up


@pytest.fixture(scope="session")
async def template(host: AsyncHost, image: str) -> Instance:
    """A template with a warm Python: booted once, forked by nearly every test."""
    vm = await host.call(
        RunRequest(image=image, command=["python3", "-c", WARM_SERVER], name="stump", memory_bytes=GUEST_MEMORY)
    )
    await warm_up(host, vm)
    await host.call(StandbyRequest(instance=vm.id))
    return await host.call(PromoteRequest(instance=vm.id))


@pytest.fixture
async def vm(host: AsyncHost, template: Instance) -> AsyncIterator[Instance]:
    """A machine for one test: a fork of the template."""
    async with (await host.get(template.id)).fork(1, atomic=True) as (fork,):
        yield fork.record
