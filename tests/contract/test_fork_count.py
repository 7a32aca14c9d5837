"""The fork count is derived from living instances, so it always says whether a template
is in use.
"""

from __future__ import annotations

import os
import signal

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import InUse
from coppice.model import State
from coppice.requests import DemoteRequest, ForkRequest, GetRequest, InspectRequest, RmRequest
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, make
from fakes.pids import ended


async def forks(host: AsyncHost) -> tuple[str, ...]:
    """Return the names of the living forks; the inspection and the refusals must agree on them."""
    found = await host.call(InspectRequest(instance="oak"))
    assert found.fork_count == len(found.forks)
    if found.forks:
        for request in (RmRequest(instance="oak"), DemoteRequest(instance="oak")):
            with pytest.raises(InUse) as refused:
                await host.call(request)
            assert f"({', '.join(sorted(found.forks))})" in str(refused.value)
    return found.forks


async def test_the_fork_count_is_right_after_failures_and_crashes(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """The count is right after a fork, a failed fork, a crash of a fork, a crash of the forking
    host and a removal.
    """
    await make(fake_host, State.TEMPLATE)
    assert await forks(fake_host) == ()
    (elm, ash) = (
        await fake_host.call(ForkRequest(instance="oak", count=2, names=["elm", "ash"], atomic=True))
    ).instances
    assert await forks(fake_host) == ("elm", "ash")
    driver.faults.fail_at("identity")
    assert (await fake_host.call(ForkRequest(instance="oak", names=["bad"]))).succeeded == 0
    assert await forks(fake_host) == ("elm", "ash")
    assert elm.vmm is not None
    os.kill(elm.vmm.pid, signal.SIGKILL)
    await ended(elm.vmm)
    assert (await fake_host.call(GetRequest(instance="elm"))).state is State.STOPPED
    assert await forks(fake_host) == ("elm", "ash")  # it still has its disk
    dead = Store(fake_host.local.rooms.layout.database, (1, 1))  # no process has this start time
    dead.begin(ash, JournalOperation.FORK)
    dead.close()
    async with make_host() as next_host:
        assert await forks(next_host) == ("elm",)
        await next_host.call(RmRequest(instance="elm"))
        assert await forks(next_host) == ()
        await next_host.call(DemoteRequest(instance="oak"))
        await assert_tidy(next_host, "oak")
