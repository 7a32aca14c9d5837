"""The fork count: derived from what lives, so that nobody is in doubt whether a template is in use."""

from __future__ import annotations

import os
import signal

import pytest

from conftest import HostFactory
from coppice.errors import InUse
from coppice.host import AsyncHost
from coppice.model import State
from coppice.store.store import Store
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, make
from fakes.pids import ended


async def forks(host: AsyncHost) -> tuple[str, ...]:
    """Names of the living forks, as the refusal and the inspection say them."""
    found = await host.inspect("oak")
    assert found.fork_count == len(found.forks)
    if found.forks:
        for refuse in (host.rm, host.demote):
            with pytest.raises(InUse) as refused:
                await refuse("oak")
            assert f"({', '.join(sorted(found.forks))})" in str(refused.value)
    return found.forks


async def test_the_count_is_right_after_everything(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """After a fork, a fork that failed, a crash of a fork, a crash of the host that forked, and a removal."""
    await make(fake_host, State.TEMPLATE)
    assert await forks(fake_host) == ()
    (elm, ash) = (await fake_host.fork("oak", count=2, names=["elm", "ash"], atomic=True)).instances
    assert await forks(fake_host) == ("elm", "ash")
    driver.faults.fail_at("identity")
    assert (await fake_host.fork("oak", names=["bad"])).succeeded == 0
    assert await forks(fake_host) == ("elm", "ash")
    assert elm.vmm is not None
    os.kill(elm.vmm.pid, signal.SIGKILL)
    await ended(elm.vmm)
    assert (await fake_host.get("elm")).state is State.STOPPED
    assert await forks(fake_host) == ("elm", "ash")  # it has its disk still
    dead = Store(fake_host.rooms.layout.database, (1, 1))  # no process has this start time
    dead.begin(ash, "fork")
    dead.close()
    async with make_host() as next_host:
        assert await forks(next_host) == ("elm",)
        await next_host.rm("elm")
        assert await forks(next_host) == ()
        await next_host.demote("oak")
        await assert_tidy(next_host, "oak")
