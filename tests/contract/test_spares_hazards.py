"""Hazards of spares: other hosts that clean up, a cancellation at any wait, a removal that fails,
too many links.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import VmmError
from coppice.fork.spare import Spare
from coppice.host import recovery
from coppice.host import spares as policy
from coppice.host.housekeeping import Housekeeping
from coppice.host.lifecycle import Lifecycle
from coppice.machine.rooms import Rooms
from coppice.model import State
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    GetRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    StandbyRequest,
    StartAheadRequest,
)
from coppice.state import locks
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, cancelled_at, make
from fakes.rooms import DEADLINES, open_rooms

_MOST_WAITS = 400


def host_on(home: Path, driver: FakeDriver) -> AsyncHost:
    """Return a host that starts spares only on request."""
    return AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)


@pytest.fixture
async def host(fake_home: Path, driver: FakeDriver) -> AsyncIterator[AsyncHost]:
    """A host without automatic spares, with a template."""
    async with host_on(fake_home, driver) as opened:
        await make(opened, State.TEMPLATE)
        yield opened


async def orphan(host: AsyncHost) -> Spare:
    """Make a spare that its host forgets, as if the host had been killed."""
    await host.call(StartAheadRequest(instance="oak"))
    (spare,) = host.local.group(Lifecycle)._spare()._ready
    host.local.group(Lifecycle)._spare()._ready.clear()
    locks.release(spare.give_lock())
    return spare


async def test_opening_a_host_leaves_a_spare_that_becomes_a_fork_alone(
    host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that opens the data directory must not remove a spare that became a fork after the
    host listed it.
    """
    await host.call(StartAheadRequest(instance="oak"))
    list_them, loop = recovery._without_record, asyncio.get_running_loop()
    listed: list[set[str]] = []

    def slowly(rooms: Rooms) -> set[str]:
        found = list_them(rooms)
        assert found
        listed.append(found)
        if len(listed) == 2:  # the first list only decides whether to sweep
            asyncio.run_coroutine_threadsafe(host.call(ForkRequest(instance="oak", names=["elm"])), loop).result(20)
        return found

    monkeypatch.setattr(recovery, "_without_record", slowly)
    async with make_host() as other:
        assert await ask(other, "elm", "hostname") == "elm"
    assert len(listed) == 2
    await assert_tidy(host, "oak", "elm")


async def test_gc_leaves_a_spare_that_becomes_a_fork_alone(
    host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc must not remove a spare that became a fork after gc listed it."""
    async with make_host() as other:
        await host.call(StartAheadRequest(instance="oak"))
        list_them, loop = other.local.group(Housekeeping)._unowned, asyncio.get_running_loop()

        def slowly() -> set[str]:
            found = list_them()
            assert found
            asyncio.run_coroutine_threadsafe(host.call(ForkRequest(instance="oak", names=["elm"])), loop).result(20)
            return found

        monkeypatch.setattr(other.local.group(Housekeeping), "_unowned", slowly)
        assert (await other.gc()).removed == ()
        assert await ask(other, "elm", "hostname") == "elm"
    await assert_tidy(host, "oak", "elm")


async def test_nothing_is_left_when_closing_is_cancelled(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory
) -> None:
    """No VMM is left, and no lock that would keep other hosts from removing one."""
    async with make_host() as first:
        await make(first, State.TEMPLATE)
    for nth in range(1, _MOST_WAITS):
        host = await host_on(fake_home, driver).open()
        await host.call(StartAheadRequest(instance="oak"))
        came = await cancelled_at(host.close(), nth)
        async with make_host() as after:
            await assert_tidy(after, "oak")
        if not came:
            return
    pytest.fail("closing waits more often than this test cancels")


async def test_nothing_is_left_when_a_demotion_is_cancelled(host: AsyncHost) -> None:
    """A spare that survives a cancelled demotion still has an idle time, so it does not stay."""
    for nth in range(1, _MOST_WAITS):
        await host.call(StartAheadRequest(instance="oak", count=2))
        came = await cancelled_at(host.call(DemoteRequest(instance="oak")), nth)
        await host.local.group(Lifecycle)._spare().settled()
        assert host.local.group(Lifecycle)._spare()._expected or not host.local.group(Lifecycle)._spare()._ready
        if (await host.call(GetRequest(instance="oak"))).state is State.STANDBY:
            await host.local.group(Lifecycle)._spare().drop((await host.call(GetRequest(instance="oak"))).id)
            await assert_tidy(host, "oak")
            await host.call(PromoteRequest(instance="oak"))
        if not came:
            return
    pytest.fail("a demotion waits more often than this test cancels")


async def test_a_spare_that_cannot_be_removed_does_not_block_opening(
    host: AsyncHost, driver: FakeDriver, make_host: HostFactory
) -> None:
    """The data directory can be opened while a spare's VMM does not end.

    The next host tries again.
    """
    await orphan(host)
    driver.faults.fail_at("quit")
    async with make_host() as other:
        assert [vm.name for vm in await other.call(LsRequest())] == ["oak"]
    async with make_host() as other:
        await assert_tidy(other, "oak")


async def test_a_half_removed_spare_is_removed(host: AsyncHost, make_host: HostFactory) -> None:
    """Its host was killed during the removal, after it had renamed the directory."""
    spare = await orphan(host)
    await host.local.rooms.drivers.chosen.quit(host.local.rooms.directory(spare.id), spare.process)
    directory = host.local.rooms.directory(spare.id)
    directory.rename(directory.with_name(f".{directory.name}.removed"))
    async with make_host() as other:
        await assert_tidy(other, "oak")


async def test_a_spare_that_cannot_be_made_or_removed_is_not_locked(host: AsyncHost, driver: FakeDriver) -> None:
    """The next cleanup must be able to lock and remove it."""
    driver.faults.fail_at("is_paused")
    driver.faults.fail_at("quit")
    with pytest.raises(VmmError):
        await host.call(StartAheadRequest(instance="oak"))
    await host.gc()
    await assert_tidy(host, "oak")


async def test_a_spare_whose_lock_file_is_swept_gets_another_id(
    host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host that opens finds the lock file without a record and removes it before the
    spare's host can lock it.
    """
    taking = locks.try_lock
    swept: list[int | None] = []

    def slowly(path: Path, *, shared: bool = False, create: bool = True) -> int | None:
        if not swept and not shared:
            swept.append(taking(path))
        return taking(path, shared=shared, create=create)

    monkeypatch.setattr(locks, "try_lock", slowly)
    assert await host.call(StartAheadRequest(instance="oak")) == 1
    (descriptor,) = swept
    assert descriptor is not None
    (lock,) = (
        path for path in host.local.rooms.layout.locks.iterdir() if path.stat().st_ino == os.fstat(descriptor).st_ino
    )
    lock.unlink()
    locks.release(descriptor)
    await host.local.group(Lifecycle)._spare().drop((await host.call(GetRequest(instance="oak"))).id)
    await assert_tidy(host, "oak")


async def test_parallel_requests_for_spares_respect_the_limits(
    host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spare counts before its VMM starts, for its template and for all together."""
    assert await asyncio.gather(*(host.call(StartAheadRequest(instance="oak", count=2)) for _ in range(3))) == [2, 2, 2]
    monkeypatch.setattr(policy, "MAX_SPARES", 3)
    await make(host, State.TEMPLATE, "elm")
    assert sorted(
        await asyncio.gather(
            host.call(StartAheadRequest(instance="oak", count=3)), host.call(StartAheadRequest(instance="elm", count=3))
        )
    ) in ([0, 3], [1, 2])
    assert len(host.local.group(Lifecycle)._spare()._ready) == 3


async def test_a_spare_whose_link_fails_is_replaced_by_an_ordinary_start(
    host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork's VMM must map the file that its record names, else it could not be captured.

    A file can have only so many links.
    """
    await host.call(StartAheadRequest(instance="oak"))
    link = os.link

    def refused(source: str, destination: str, *, follow_symlinks: bool = True) -> None:
        if Path(destination).name == files.MEMORY:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, destination, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "link", refused)
    (result,) = (await host.call(ForkRequest(instance="oak", names=["elm"]))).results
    assert not result.started_ahead
    assert result.sharing == "copy"
    await ask(host, "elm", "remember", "key", "value")
    await host.call(StandbyRequest(instance="elm"))
    await host.call(RestoreRequest(instance="elm"))
    assert await ask(host, "elm", "recall", "key") == "value"
    await assert_tidy(host, "oak", "elm")
