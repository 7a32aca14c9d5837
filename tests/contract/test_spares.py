"""Spares: from the third fork on, a VMM that was started ahead becomes the fork.

It is a fork like any other, and no spare is left behind.
"""

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
from coppice.client import AsyncHost
from coppice.errors import NameTaken, NotSupported, UsageError
from coppice.host import spares as policy
from coppice.host.lifecycle import Lifecycle
from coppice.model import ForkResult, Instance, Publish, State
from coppice.names import MAX_SPARES
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    GetRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartAheadRequest,
)
from coppice.state import locks
from coppice.vmm import driver as files
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.hosting import ask, assert_tidy, boot, cancelled_at, make, memory_of
from fakes.pids import ended
from fakes.rooms import DEADLINES, open_rooms

_MOST_WAITS = 400


def host_with(home: Path, driver: FakeDriver, spares: int | None = 1) -> AsyncHost:
    return AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=spares)


@pytest.fixture
async def host(fake_home: Path, driver: FakeDriver) -> AsyncIterator[AsyncHost]:
    """A host that keeps one spare, with a template."""
    async with host_with(fake_home, driver) as opened:
        await make(opened, State.TEMPLATE)
        yield opened


async def fork(host: AsyncHost, name: str, source: str = "oak") -> ForkResult:
    """Fork once, and wait until the spares that this calls for are started."""
    (result,) = (await host.call(ForkRequest(instance=source, names=[name], atomic=True))).results
    await host.local.group(Lifecycle)._spare().settled()
    return result


async def warm(host: AsyncHost, source: str = "oak") -> Path:
    """Make two forks and remove them, so that a spare starts; return its directory."""
    before = {path.name for path in host.local.rooms.layout.instances.iterdir()}
    for name in ("first", "second"):
        assert not (await fork(host, name, source)).started_ahead
        await host.call(RmRequest(instance=name))
    (directory,) = (path for path in host.local.rooms.layout.instances.iterdir() if path.name not in before)
    return directory


def vmm_in(host: AsyncHost, directory: Path) -> int:
    (process,) = host.local.rooms.drivers.chosen.find_orphans(host.local.rooms.layout.instances)[directory]
    return process.pid


async def test_the_third_fork_finds_its_vmm_started(host: AsyncHost) -> None:
    """The fork has the spare's VMM and directory, its own identity and link to the mem-file, and
    knows what the source knew.
    """
    await boot(host, "elm")
    await ask(host, "elm", "remember", "key", "value")
    await host.call(StandbyRequest(instance="elm"))
    await host.call(PromoteRequest(instance="elm"))
    directory = await warm(host, "elm")
    waiting = vmm_in(host, directory)
    assert memory_of(host, await host.call(GetRequest(instance="elm"))).stat().st_nlink == 1  # a spare has no link yet
    assert not (directory / files.MEMORY).exists()
    result = await fork(host, "ash", "elm")
    assert result.started_ahead
    ash = await host.call(GetRequest(instance="ash"))
    assert ash.vmm is not None
    assert (ash.vmm.pid, host.local.rooms.directory(ash.id)) == (waiting, directory)
    assert memory_of(host, ash).samefile(memory_of(host, await host.call(GetRequest(instance="elm"))))
    assert memory_of(host, ash).stat().st_nlink == 2
    assert result.sharing == "hardlink"
    assert await ask(host, "ash", "recall", "key") == "value"
    assert await ask(host, "ash", "hostname") == "ash"
    assert ash.parent == (await host.call(GetRequest(instance="elm"))).id


async def test_a_spare_is_not_listed(host: AsyncHost, make_host: HostFactory) -> None:
    """It has no record, does not count as a fork, and other hosts leave it alone, also in gc."""
    directory = await warm(host)
    pid = vmm_in(host, directory)
    async with make_host() as other:
        assert [vm.name for vm in await other.call(LsRequest())] == ["oak"]
        assert (await other.gc()).removed == ()
    assert vmm_in(host, directory) == pid
    assert (await fork(host, "elm")).started_ahead


async def test_nothing_is_left_when_the_host_is_closed(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory
) -> None:
    """Closing the host removes a spare that is ready, and one that is being started."""
    async with host_with(fake_home, driver) as host:
        await make(host, State.TEMPLATE)
        await warm(host)
    async with make_host() as after:
        await assert_tidy(after, "oak")
    for step in ("manifest", "restore", "restored", "is_paused"):
        async with host_with(fake_home, driver) as host:
            await host.call(ForkRequest(instance="oak", names=["elm"]))
            gate = driver.faults.hold_at(step, nth=2 if step != "is_paused" else 1)
            await host.call(ForkRequest(instance="oak", names=["ash"]))
            await asyncio.wait_for(gate.reached.wait(), 10)
            await host.call(RmRequest(instance="elm"))
            closing = asyncio.create_task(host.close())
            await asyncio.sleep(0)
            gate.release.set()
            await closing
        async with make_host() as after:
            await after.call(RmRequest(instance="ash"))
            await assert_tidy(after, "oak")


async def test_the_next_host_removes_the_spares_of_a_killed_one(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory
) -> None:
    """Their locks are free and they have no record, so VMM, directory and lock file are removed at
    the next open.
    """
    async with host_with(fake_home, driver) as host:
        await make(host, State.TEMPLATE)
        directory = await warm(host)
        (spare,) = host.local.group(Lifecycle)._spare()._ready
        host.local.group(Lifecycle)._spare()._ready.clear()  # as if the host had been killed
        locks.release(spare.give_lock())
    assert directory.exists()
    async with make_host() as after:
        assert not directory.exists()
        assert not driver.alive(spare.process)
        await assert_tidy(after, "oak")


async def test_only_plain_forks_of_a_template_use_a_spare(host: AsyncHost) -> None:
    """Ports, a target other than Running, or a source other than a template rule out a spare."""
    directory = await warm(host)
    port = Publish(host_port=18080, guest_port=80)
    assert not (await host.call(ForkRequest(instance="oak", names=["elm"], publish=[port]))).results[0].started_ahead
    assert (
        not (await host.call(ForkRequest(instance="oak", names=["fir"], target=State.STANDBY))).results[0].started_ahead
    )
    assert not (await host.call(ForkRequest(instance="fir", names=["ivy"]))).results[0].started_ahead
    assert directory.exists()
    report = await host.call(ForkRequest(instance="oak", names=["ash"], count=3))
    assert [result.started_ahead for result in report.results] == [True, False, False]


async def test_a_host_without_spares_starts_none(fake_home: Path, fake_vmm: Path) -> None:
    """A host may keep no spares, and some drivers cannot leave a guest paused."""
    able = FakeDriver(fake_vmm)
    unable = FakeDriver(fake_vmm, capabilities=msgspec.structs.replace(CAPABILITIES, restores_paused=False))
    for driver, spares in ((able, 0), (unable, 1)):
        async with host_with(fake_home, driver, spares) as host:
            await make(host, State.TEMPLATE)
            for name in ("elm", "ash", "fir"):
                assert not (await fork(host, name)).started_ahead
                await host.call(RmRequest(instance=name))
            await assert_tidy(host, "oak")
            await host.call(RmRequest(instance="oak"))
        await driver.end(fake_home / "instances")
    with pytest.raises(UsageError):
        host_with(fake_home, able, -1)


async def test_each_template_has_its_own_spares(
    fake_home: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forks of two templates in turns find theirs, and one limit covers all spares."""
    monkeypatch.setattr(policy, "MAX_SPARES", 3)
    async with host_with(fake_home, driver, 2) as host:
        for source in ("oak", "yew"):
            await make(host, State.TEMPLATE, source)
        for number in (1, 2):
            for source in ("oak", "yew"):
                await fork(host, f"{source}-{number}", source)
        assert len(host.local.group(Lifecycle)._spare()._ready) == 3
        started = [(await fork(host, f"{source}-3", source)).started_ahead for source in ("yew", "oak")]
        assert started == [True, True]
        assert len(host.local.group(Lifecycle)._spare()._ready) == 3
        report = await host.call(ForkRequest(instance="oak", count=3))
        assert sum(result.started_ahead for result in report.results) in (1, 2)


async def test_the_number_of_spares_follows_the_rate_of_forks(fake_home: Path, driver: FakeDriver) -> None:
    """By default, a host has as many spares ready as forks were requested within a second lately."""
    async with host_with(fake_home, driver, spares=None) as host:
        await make(host, State.TEMPLATE)
        requests = [ForkRequest(instance="oak", names=[name], atomic=True) for name in ("elm", "fir", "ash", "yew")]
        await asyncio.gather(*map(host.call, requests))
        await fork(host, "box")
        report = await host.call(ForkRequest(instance="oak", count=6, atomic=True))
        assert 2 <= [result.started_ahead for result in report.results].count(True) <= 5


async def test_a_repeated_fan_out_finds_its_vmms_started(fake_home: Path, driver: FakeDriver) -> None:
    """Each fork of a fan-out counts; nothing is started ahead before the second one."""
    async with host_with(fake_home, driver, spares=None) as host:
        await make(host, State.TEMPLATE)
        for expected in (0, 0, 3):
            report = await host.call(ForkRequest(instance="oak", count=3, atomic=True))
            assert [result.started_ahead for result in report.results].count(True) == expected
            await host.local.group(Lifecycle)._spare().settled()
            for instance in report.instances:
                await host.call(RmRequest(instance=instance.id))


async def test_a_large_fan_out_alone_leaves_few_spares(fake_home: Path, driver: FakeDriver) -> None:
    """It may not come again, and each spare costs memory: only a repeated one counts in full."""
    async with host_with(fake_home, driver, spares=None) as host:
        await make(host, State.TEMPLATE)
        await host.call(StartAheadRequest(instance="oak", count=1))
        await host.call(ForkRequest(instance="oak", count=8, target=State.RUNNING, atomic=True))
        await host.local.group(Lifecycle)._spare().settled()
        assert len(host.local.group(Lifecycle)._spare()._ready) == 1
        await fork(host, "elm")
        assert len(host.local.group(Lifecycle)._spare()._ready) <= 2


def test_the_largest_burst_counts() -> None:
    """Forks within a second count together, those of half a minute ago no longer, and the number is bounded."""
    rate = policy._Rate()
    for at in (100.0, 100.5, 100.9, 102.0):
        rate.count(at, 1)
    assert rate.largest_burst == 3
    rate.count(131.5, 1)
    assert rate.largest_burst == 1
    for _ in range(3 * MAX_SPARES):
        rate.count(132.0, 1)
    assert rate.largest_burst == MAX_SPARES


@pytest.mark.parametrize(
    ("forks", "burst"), [([100], 1), ([100, 1], 1), ([4, 4], 4), ([4, 8, 2], 4), ([100, 100], MAX_SPARES)]
)
def test_fan_outs_count_for_all_their_forks(forks: list[int], burst: int) -> None:
    """The largest one counts as the second largest, as it may not come again."""
    rate = policy._Rate()
    for number, each in enumerate(forks):
        rate.count(100.0 + 2 * number, each)
    assert rate.largest_burst == burst


async def test_spares_can_be_started_on_request(fake_home: Path, driver: FakeDriver) -> None:
    """A host that keeps no spares starts as many as requested, and only for a template."""
    async with host_with(fake_home, driver, 0) as host:
        await make(host, State.TEMPLATE)
        assert await host.call(StartAheadRequest(instance="oak", count=3)) == 3
        assert await host.call(StartAheadRequest(instance="oak", count=2)) == 3
        report = await host.call(ForkRequest(instance="oak", count=4))
        assert [result.started_ahead for result in report.results] == [True, True, True, False]
        assert host.local.group(Lifecycle)._spare()._ready == []
        await make(host, State.STANDBY, "elm")
        with pytest.raises(NotSupported):
            await host.call(StartAheadRequest(instance="elm"))
        with pytest.raises(UsageError):
            await host.call(StartAheadRequest(instance="oak", count=MAX_SPARES + 1))


async def test_spares_are_removed_with_their_template(host: AsyncHost) -> None:
    """A demotion or a removal of the template removes its spares."""
    for number, end in enumerate((DemoteRequest(instance="oak"), RmRequest(instance="oak"))):
        if number:
            await host.call(PromoteRequest(instance="oak"))
        directory = await warm(host)
        await host.call(end)
        assert not directory.exists()
    await assert_tidy(host)


async def test_spares_are_removed_after_an_idle_time(host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute after the latest fork, here less, the spares are removed."""
    monkeypatch.setattr(policy, "IDLE_S", 0.3)
    directory = await warm(host)
    async with asyncio.timeout(10):
        while host.local.group(Lifecycle)._spare()._expected:  # noqa: ASYNC110 - a timer's end has no event
            await asyncio.sleep(0.01)
    await host.local.group(Lifecycle)._spare().settled()
    assert not directory.exists()
    await assert_tidy(host, "oak")


async def test_a_spare_of_an_older_capture_is_not_used(host: AsyncHost, make_host: HostFactory) -> None:
    """Another host demotes, runs and captures the template again.

    A spare of the old capture must not become a fork.
    """
    directory = await warm(host)
    async with make_host() as other:
        await other.call(DemoteRequest(instance="oak"))
        await other.call(RestoreRequest(instance="oak"))
        await ask(other, "oak", "remember", "key", "new")
        await other.call(StandbyRequest(instance="oak"))
        await other.call(PromoteRequest(instance="oak"))
    result = await fork(host, "elm")
    assert not result.started_ahead
    assert await ask(host, "elm", "recall", "key") == "new"
    assert not directory.exists()
    assert (await fork(host, "ash")).started_ahead
    assert await ask(host, "ash", "recall", "key") == "new"


async def test_a_spare_whose_vmm_has_ended_is_removed(host: AsyncHost) -> None:
    """The fork starts its VMM itself, and the remains of the spare are removed."""
    directory = await warm(host)
    (spare,) = host.local.group(Lifecycle)._spare()._ready
    os.kill(spare.process.pid, signal.SIGKILL)
    await ended(spare.process)
    assert not (await fork(host, "elm")).started_ahead
    assert not directory.exists()
    await host.call(RmRequest(instance="elm"))
    await host.close()


@pytest.mark.parametrize("step", ["resume", "identity"])
async def test_a_fork_whose_spare_fails_is_undone(host: AsyncHost, driver: FakeDriver, step: str) -> None:
    """If the spare's VMM fails or dies at a step, the fork reports an error and leaves nothing."""
    for plan in (driver.faults.fail_at, driver.faults.die_at):
        directory = await warm(host)
        plan(step)
        (result,) = (await host.call(ForkRequest(instance="oak", names=["elm"]))).results
        assert not result.ok
        assert not directory.exists()
        await host.local.group(Lifecycle)._spare().drop((await host.call(GetRequest(instance="oak"))).id)
        await assert_tidy(host, "oak")


async def test_a_refused_fork_leaves_no_spare_behind(host: AsyncHost) -> None:
    """The spare was already taken for the fork when the name was refused."""
    await warm(host)
    with pytest.raises(NameTaken):
        await host.call(ForkRequest(instance="oak", names=["oak"]))
    await host.local.group(Lifecycle)._spare().settled()
    await assert_tidy(host, "oak")


async def test_a_cancelled_fork_with_a_spare_leaves_nothing(host: AsyncHost) -> None:
    """The fork is cancelled at each of its waits in turn."""
    for nth in range(1, _MOST_WAITS):
        await warm(host)
        came = await cancelled_at(host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2)), nth)
        await host.local.group(Lifecycle)._spare().drop((await host.call(GetRequest(instance="oak"))).id)
        if not came:
            break
        await assert_tidy(host, "oak")
    else:
        pytest.fail("a fork waits more often than this test cancels")
    await assert_tidy(host, "oak", "elm", "fir")


async def test_parallel_forks_never_share_a_spare(fake_home: Path, driver: FakeDriver) -> None:
    """Each of several parallel forks has its own VMM and its own identity."""
    async with host_with(fake_home, driver, 3) as host:
        await make(host, State.TEMPLATE)
        await warm_many(host)
        forks = await asyncio.gather(*(fork(host, f"elm-{number}") for number in range(8)))
        assert sum(result.started_ahead for result in forks) >= 3
        running: list[Instance] = [result.instance for result in forks if result.instance]
        assert len({vm.vmm.pid for vm in running if vm.vmm}) == 8
        for vm in running:
            assert await ask(host, vm, "hostname") == vm.name
            await host.call(RmRequest(instance=vm.id))
    with contextlib.suppress(FileNotFoundError):
        assert {path.name for path in (fake_home / "instances").iterdir()} == {(await stump(fake_home, driver)).id}


async def warm_many(host: AsyncHost) -> None:
    for name in ("first", "second"):
        await fork(host, name)
        await host.call(RmRequest(instance=name))


async def stump(home: Path, driver: FakeDriver) -> Instance:
    async with host_with(home, driver, 0) as host:
        return await host.call(GetRequest(instance="oak"))
