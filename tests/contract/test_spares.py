"""VMMs that are started ahead: the third fork and those after it find one, it is a fork like any other, and none is ever left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.errors import NameTaken, NotSupported, UsageError
from coppice.host import AsyncHost
from coppice.host import spares as policy
from coppice.model import ForkResult, Instance, Publish, State
from coppice.store import locks
from coppice.vmm import driver as files
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.hosting import ask, assert_tidy, boot, cancelled_at, make, memory_of
from fakes.pids import ended
from fakes.rooms import DEADLINES, open_rooms

_MOST_WAITS = 400


def host_with(home: Path, driver: FakeDriver, spares: int = 1) -> AsyncHost:
    return AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=spares)


@pytest.fixture
async def host(fake_home: Path, driver: FakeDriver) -> AsyncIterator[AsyncHost]:
    """A host that keeps one spare, with a template."""
    async with host_with(fake_home, driver) as opened:
        await make(opened, State.TEMPLATE)
        yield opened


async def fork(host: AsyncHost, name: str, source: str = "oak") -> ForkResult:
    """Fork once, and wait until what is started ahead because of it is."""
    (result,) = (await host.fork(source, names=[name], atomic=True)).results
    await host._spare().settled()
    return result


async def warm(host: AsyncHost, source: str = "oak") -> Path:
    """Two forks, removed again: there is a spare. Its directory."""
    before = {path.name for path in host.rooms.layout.instances.iterdir()}
    for name in ("first", "second"):
        assert not (await fork(host, name, source)).started_ahead
        await host.rm(name)
    (directory,) = (path for path in host.rooms.layout.instances.iterdir() if path.name not in before)
    return directory


def vmm_in(host: AsyncHost, directory: Path) -> int:
    (process,) = host.rooms.driver.find_orphans(host.rooms.layout.instances)[directory]
    return process.pid


async def test_the_third_fork_finds_its_vmm_started(host: AsyncHost) -> None:
    """It is the VMM that waited, and all else is its own: directory, identity, link of the mem-file. What the source knew it knows."""
    await boot(host, "elm")
    await ask(host, "elm", "remember", "key", "value")
    await host.standby("elm")
    await host.promote("elm")
    directory = await warm(host, "elm")
    waiting = vmm_in(host, directory)
    assert memory_of(host, await host.get("elm")).stat().st_nlink == 1  # it is nobody's fork yet
    assert not (directory / files.MEMORY).exists()
    result = await fork(host, "ash", "elm")
    assert result.started_ahead
    ash = await host.get("ash")
    assert ash.vmm is not None
    assert (ash.vmm.pid, host.rooms.directory(ash.id)) == (waiting, directory)
    assert memory_of(host, ash).samefile(memory_of(host, await host.get("elm")))
    assert memory_of(host, ash).stat().st_nlink == 2
    assert result.memory is not None
    assert result.memory.sharing == "hardlink"
    assert await ask(host, "ash", "recall", "key") == "value"
    assert await ask(host, "ash", "hostname") == "ash"
    assert ash.parent == (await host.get("elm")).id


async def test_it_is_seen_by_nobody(host: AsyncHost, make_host: HostFactory) -> None:
    """No record, no fork of its template, and other hosts leave it alone, also those that tidy up."""
    directory = await warm(host)
    pid = vmm_in(host, directory)
    async with make_host() as other:
        assert [vm.name for vm in await other.ls()] == ["oak"]
        assert (await other.gc()).removed == ()
    assert vmm_in(host, directory) == pid
    assert (await fork(host, "elm")).started_ahead


async def test_nothing_is_left_when_the_host_is_closed(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory
) -> None:
    """Neither of a spare, nor of one that is just being started."""
    async with host_with(fake_home, driver) as host:
        await make(host, State.TEMPLATE)
        await warm(host)
    async with make_host() as after:
        await assert_tidy(after, "oak")
    for step in ("manifest", "restore", "restored", "is_paused"):
        async with host_with(fake_home, driver) as host:
            await host.fork("oak", names=["elm"])
            gate = driver.faults.hold_at(step, nth=2 if step != "is_paused" else 1)
            await host.fork("oak", names=["ash"])
            await asyncio.wait_for(gate.reached.wait(), 10)
            await host.rm("elm")
            closing = asyncio.create_task(host.close())
            await asyncio.sleep(0)
            gate.release.set()
            await closing
        async with make_host() as after:
            await after.rm("ash")
            await assert_tidy(after, "oak")


async def test_what_a_killed_host_leaves_goes_with_the_next(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory
) -> None:
    """Its locks are free then, and there is no record: VMM, directory and lock file are removed when the data directory is opened."""
    async with host_with(fake_home, driver) as host:
        await make(host, State.TEMPLATE)
        directory = await warm(host)
        (spare,) = host._spare()._ready
        host._spare()._ready.clear()  # as if it had been killed
        locks.release(spare.give_lock())
    assert directory.exists()
    async with make_host() as after:
        assert not directory.exists()
        assert not driver.alive(spare.process)
        await assert_tidy(after, "oak")


async def test_only_what_is_known_beforehand_is_started_ahead(host: AsyncHost) -> None:
    """A fork that publishes ports, is not to run, or is of something else than a template, starts its VMM itself."""
    directory = await warm(host)
    port = Publish(host_port=18080, guest_port=80)
    assert not (await host.fork("oak", names=["elm"], publish=[port])).results[0].started_ahead
    assert not (await host.fork("oak", names=["fir"], target=State.STANDBY)).results[0].started_ahead
    assert not (await host.fork("fir", names=["ivy"])).results[0].started_ahead
    assert directory.exists()
    report = await host.fork("oak", names=["ash"], count=3)
    assert [result.started_ahead for result in report.results] == [True, False, False]


async def test_none_where_none_are_wanted(fake_home: Path, fake_vmm: Path) -> None:
    """A host without spares, and a driver that cannot leave a guest stopped."""
    able = FakeDriver(fake_vmm)
    unable = FakeDriver(fake_vmm, capabilities=msgspec.structs.replace(CAPABILITIES, restores_paused=False))
    for driver, spares in ((able, 0), (unable, 1)):
        async with host_with(fake_home, driver, spares) as host:
            await make(host, State.TEMPLATE)
            for name in ("elm", "ash", "fir"):
                assert not (await fork(host, name)).started_ahead
                await host.rm(name)
            await assert_tidy(host, "oak")
            await host.rm("oak")
        await driver.end(fake_home / "instances")
    with pytest.raises(UsageError):
        host_with(fake_home, able, -1)


async def test_several_for_each_template(fake_home: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of two in turns find theirs, and there is a limit for all together."""
    monkeypatch.setattr(policy, "MOST", 3)
    async with host_with(fake_home, driver, 2) as host:
        for source in ("oak", "yew"):
            await make(host, State.TEMPLATE, source)
        for number in (1, 2):
            for source in ("oak", "yew"):
                await fork(host, f"{source}-{number}", source)
        assert len(host._spare()._ready) == 3
        started = [(await fork(host, f"{source}-3", source)).started_ahead for source in ("yew", "oak")]
        assert started == [True, True]
        assert len(host._spare()._ready) == 3
        report = await host.fork("oak", count=3)
        assert sum(result.started_ahead for result in report.results) in (1, 2)


async def test_a_burst_that_is_expected_is_started_ahead(fake_home: Path, driver: FakeDriver) -> None:
    """As many as are asked for, also by a host that keeps none of itself; no more than that, and only of a template."""
    async with host_with(fake_home, driver, 0) as host:
        await make(host, State.TEMPLATE)
        assert await host.start_ahead("oak", 3) == 3
        assert await host.start_ahead("oak", 2) == 3
        report = await host.fork("oak", count=4)
        assert [result.started_ahead for result in report.results] == [True, True, True, False]
        assert host._spare()._ready == []
        await make(host, State.STANDBY, "elm")
        with pytest.raises(NotSupported):
            await host.start_ahead("elm")
        with pytest.raises(UsageError):
            await host.start_ahead("oak", policy.MOST + 1)


async def test_they_go_with_their_template(host: AsyncHost) -> None:
    """Demoted, or removed, or not forked for long."""
    for number, end in enumerate((host.demote, host.rm)):
        if number:
            await host.promote("oak")
        directory = await warm(host)
        await end("oak")
        assert not directory.exists()
    await assert_tidy(host)


async def test_they_go_when_no_fork_is_expected_any_more(host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute, here less, after the latest fork."""
    monkeypatch.setattr(policy, "IDLE_S", 0.3)
    directory = await warm(host)
    async with asyncio.timeout(10):
        while host._spare()._expected:  # noqa: ASYNC110 - a timer's end has no event
            await asyncio.sleep(0.01)
    await host._spare().settled()
    assert not directory.exists()
    await assert_tidy(host, "oak")


async def test_a_template_that_was_made_anew_has_other_forks(host: AsyncHost, make_host: HostFactory) -> None:
    """Another host demotes, runs and captures it again: what was started ahead is of the past, and becomes nobody."""
    directory = await warm(host)
    async with make_host() as other:
        await other.demote("oak")
        await other.restore("oak")
        await ask(other, "oak", "remember", "key", "new")
        await other.standby("oak")
        await other.promote("oak")
    result = await fork(host, "elm")
    assert not result.started_ahead
    assert await ask(host, "elm", "recall", "key") == "new"
    assert not directory.exists()
    assert (await fork(host, "ash")).started_ahead
    assert await ask(host, "ash", "recall", "key") == "new"


async def test_one_whose_vmm_has_ended_becomes_nobody(host: AsyncHost) -> None:
    """The fork starts its VMM itself, and what is left of the other goes."""
    directory = await warm(host)
    (spare,) = host._spare()._ready
    os.kill(spare.process.pid, signal.SIGKILL)
    await ended(spare.process)
    assert not (await fork(host, "elm")).started_ahead
    assert not directory.exists()
    await host.rm("elm")
    await host.close()


@pytest.mark.parametrize("step", ["resume", "identity"])
async def test_a_fork_of_one_that_fails_is_undone(host: AsyncHost, driver: FakeDriver, step: str) -> None:
    """The VMM dies under it, at each of its steps: an error that says so, and nothing of it is left."""
    for plan in (driver.faults.fail_at, driver.faults.die_at):
        directory = await warm(host)
        plan(step)
        (result,) = (await host.fork("oak", names=["elm"])).results
        assert not result.ok
        assert not directory.exists()
        await host._spare().drop((await host.get("oak")).id)
        await assert_tidy(host, "oak")


async def test_a_fork_that_is_refused_leaves_no_spare_behind(host: AsyncHost) -> None:
    """It had been taken for it already."""
    await warm(host)
    with pytest.raises(NameTaken):
        await host.fork("oak", names=["oak"])
    await host._spare().settled()
    await assert_tidy(host, "oak")


async def test_a_fork_of_one_that_is_cancelled_leaves_nothing(host: AsyncHost) -> None:
    """At every wait of it in turn."""
    for nth in range(1, _MOST_WAITS):
        await warm(host)
        came = await cancelled_at(host.fork("oak", names=["elm", "fir"], count=2), nth)
        await host._spare().drop((await host.get("oak")).id)
        if not came:
            break
        await assert_tidy(host, "oak")
    else:
        pytest.fail("a fork waits more often than this test cancels")
    await assert_tidy(host, "oak", "elm", "fir")


async def test_many_forks_at_once(fake_home: Path, driver: FakeDriver) -> None:
    """Callers of one host do not get the same spare, and each fork is itself."""
    async with host_with(fake_home, driver, 3) as host:
        await make(host, State.TEMPLATE)
        await warm_many(host)
        forks = await asyncio.gather(*(fork(host, f"elm-{number}") for number in range(8)))
        assert sum(result.started_ahead for result in forks) >= 3
        running: list[Instance] = [result.instance for result in forks if result.instance]
        assert len({vm.vmm.pid for vm in running if vm.vmm}) == 8
        for vm in running:
            assert await ask(host, vm, "hostname") == vm.name
            await host.rm(vm)
    with contextlib.suppress(FileNotFoundError):
        assert {path.name for path in (fake_home / "instances").iterdir()} == {(await stump(fake_home, driver)).id}


async def warm_many(host: AsyncHost) -> None:
    for name in ("first", "second"):
        await fork(host, name)
        await host.rm(name)


async def stump(home: Path, driver: FakeDriver) -> Instance:
    async with host_with(home, driver, 0) as host:
        return await host.get("oak")
