"""What can happen beside a VMM that was started ahead: other hosts that tidy up, a cancellation at any wait, a removal that fails, little room."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.errors import VmmError
from coppice.fork.spare import Spare
from coppice.host import AsyncHost
from coppice.host import spares as policy
from coppice.instance import recovery
from coppice.instance.rooms import Rooms
from coppice.model import State
from coppice.store import locks
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, cancelled_at, make
from fakes.rooms import DEADLINES, open_rooms

_MOST_WAITS = 400


def host_on(home: Path, driver: FakeDriver) -> AsyncHost:
    """A host that starts ahead only what it is asked for."""
    return AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)


@pytest.fixture
async def host(fake_home: Path, driver: FakeDriver) -> AsyncIterator[AsyncHost]:
    """Such a host, with a template."""
    async with host_on(fake_home, driver) as opened:
        await make(opened, State.TEMPLATE)
        yield opened


async def orphan(host: AsyncHost) -> Spare:
    """A spare that its host forgets, as if it had been killed."""
    await host.start_ahead("oak")
    (spare,) = host._spare()._ready
    host._spare()._ready.clear()
    locks.release(spare.give_lock())
    return spare


async def test_one_that_becomes_a_fork_while_another_host_is_opened_is_left_alone(
    host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no record when that host looked, and nobody holds it when that host comes to it: by then it is a machine that runs."""
    await host.start_ahead("oak")
    list_them, loop = recovery._without_record, asyncio.get_running_loop()

    def slowly(rooms: Rooms) -> set[str]:
        found = list_them(rooms)
        assert found
        asyncio.run_coroutine_threadsafe(host.fork("oak", names=["elm"]), loop).result(20)
        return found

    monkeypatch.setattr(recovery, "_without_record", slowly)
    async with make_host() as other:
        assert await ask(other, "elm", "hostname") == "elm"
    await assert_tidy(host, "oak", "elm")


async def test_one_that_becomes_a_fork_while_another_host_collects_is_left_alone(
    host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with `gc`, which takes longer between its two looks."""
    async with make_host() as other:
        await host.start_ahead("oak")
        list_them, loop = other._unowned, asyncio.get_running_loop()

        def slowly() -> set[str]:
            found = list_them()
            assert found
            asyncio.run_coroutine_threadsafe(host.fork("oak", names=["elm"]), loop).result(20)
            return found

        monkeypatch.setattr(other, "_unowned", slowly)
        assert (await other.gc()).removed == ()
        assert await ask(other, "elm", "hostname") == "elm"
    await assert_tidy(host, "oak", "elm")


async def test_nothing_is_left_when_closing_is_cancelled(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory
) -> None:
    """At every wait of it in turn: no VMM, and no lock that would keep others from removing it."""
    async with make_host() as first:
        await make(first, State.TEMPLATE)
    for nth in range(1, _MOST_WAITS):
        host = await host_on(fake_home, driver).open()
        await host.start_ahead("oak")
        came = await cancelled_at(host.close(), nth)
        async with make_host() as after:
            await assert_tidy(after, "oak")
        if not came:
            return
    pytest.fail("closing waits more often than this test cancels")


async def test_nothing_is_left_when_a_demotion_is_cancelled(host: AsyncHost) -> None:
    """What waits goes with its template, or else when it has not been forked for long: there is none of which nobody would think again."""
    for nth in range(1, _MOST_WAITS):
        await host.start_ahead("oak", 2)
        came = await cancelled_at(host.demote("oak"), nth)
        await host._spare().settled()
        assert host._spare()._expected or not host._spare()._ready
        if (await host.get("oak")).state is State.STANDBY:
            await host._spare().drop((await host.get("oak")).id)
            await assert_tidy(host, "oak")
            await host.promote("oak")
        if not came:
            return
    pytest.fail("a demotion waits more often than this test cancels")


async def test_one_that_cannot_be_removed_keeps_nobody_out(
    host: AsyncHost, driver: FakeDriver, make_host: HostFactory
) -> None:
    """A data directory can be opened while a VMM does not end; the next one that opens it tries again."""
    await orphan(host)
    driver.faults.fail_at("quit")
    async with make_host() as other:
        assert [vm.name for vm in await other.ls()] == ["oak"]
    async with make_host() as other:
        await assert_tidy(other, "oak")


async def test_one_that_was_half_removed_is_removed(host: AsyncHost, make_host: HostFactory) -> None:
    """Its host was killed in the midst of it, when the directory had another name already."""
    spare = await orphan(host)
    await host.rooms.driver.quit(host.rooms.directory(spare.id), spare.process)
    directory = host.rooms.directory(spare.id)
    directory.rename(directory.with_name(f".{directory.name}.removed"))
    async with make_host() as other:
        await assert_tidy(other, "oak")


async def test_one_that_could_be_neither_made_nor_removed_is_not_held(host: AsyncHost, driver: FakeDriver) -> None:
    """Whoever tidies up next can have it."""
    driver.faults.fail_at("is_paused")
    driver.faults.fail_at("quit")
    with pytest.raises(VmmError):
        await host.start_ahead("oak")
    await host.gc()
    await assert_tidy(host, "oak")


async def test_one_whose_lock_file_is_swept_before_it_is_locked(
    host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host that is just being opened finds a lock file without a record, and is quicker: it is made under another id."""
    taking = locks.try_lock
    swept: list[int | None] = []

    def slowly(path: Path, *, shared: bool = False) -> int | None:
        if not swept and not shared:
            swept.append(taking(path))
        return taking(path, shared=shared)

    monkeypatch.setattr(locks, "try_lock", slowly)
    assert await host.start_ahead("oak") == 1
    (descriptor,) = swept
    assert descriptor is not None
    (lock,) = (path for path in host.rooms.layout.locks.iterdir() if path.stat().st_ino == os.fstat(descriptor).st_ino)
    lock.unlink()
    locks.release(descriptor)
    await host._spare().drop((await host.get("oak")).id)
    await assert_tidy(host, "oak")


async def test_callers_at_once_get_no_more_than_they_ask_for(host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one template, and of all together: each VMM counts from before it is started."""
    assert await asyncio.gather(*(host.start_ahead("oak", 2) for _ in range(3))) == [2, 2, 2]
    monkeypatch.setattr(policy, "MOST", 3)
    await make(host, State.TEMPLATE, "elm")
    assert sorted(await asyncio.gather(host.start_ahead("oak", 3), host.start_ahead("elm", 3))) in ([0, 3], [1, 2])
    assert len(host._spare()._ready) == 3


async def test_one_whose_link_cannot_be_made_is_started_anew(host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file can have only so many links. What the VMM of a fork maps is what its record names: else it could not be captured."""
    await host.start_ahead("oak")
    link = os.link

    def refused(source: Path, destination: Path, *, follow_symlinks: bool = True) -> None:
        if destination.name == files.MEMORY:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, destination, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "link", refused)
    (result,) = (await host.fork("oak", names=["elm"])).results
    assert not result.started_ahead
    assert result.sharing == "copy"
    await ask(host, "elm", "remember", "key", "value")
    await host.standby("elm")
    await host.restore("elm")
    assert await ask(host, "elm", "recall", "key") == "value"
    await assert_tidy(host, "oak", "elm")
