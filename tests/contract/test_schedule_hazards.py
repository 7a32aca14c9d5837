"""Snapshot schedules when something else happens: other supervisors, clocks that are set, and failed removals."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import HostCannot
from coppice.host import supervisor
from coppice.host.schedules import Schedules
from coppice.model import Snapshot
from coppice.model.automation import SnapshotSchedule
from coppice.requests import (
    RmRequest,
    SnapshotLsRequest,
    SnapshotRmRequest,
    SnapshotScheduleRequest,
    SnapshotScheduleRmRequest,
    SnapshotScheduleSetRequest,
    UpdateRequest,
)
from coppice.state import locks
from coppice.state import schedules as recorded
from fakes.clock import FakeClock
from fakes.driver import FakeDriver
from fakes.hosting import boot
from fakes.rooms import DEADLINES, IMAGE, open_rooms
from fakes.supervising import SOON_S, supervised, until_removed

HOUR_S = 3600.0


async def schedule(host: AsyncHost, name: str = "oak", **options: object) -> SnapshotSchedule:
    """Let snapshots be taken every hour, and the newest be kept."""
    given = {"interval_s": HOUR_S, "max_count": 1, **options}
    return await host.call(SnapshotScheduleSetRequest(instance=name, **given))  # type: ignore[arg-type]


async def run(host: AsyncHost, at: float) -> list[Snapshot]:
    """Look after the schedule of oak at a time. Return all snapshots."""
    found = await host.call(SnapshotScheduleRequest(instance="oak"))
    await host.local.group(Schedules).attend_schedule(found.instance, at)
    return await host.call(SnapshotLsRequest())


async def test_a_clock_that_was_set_back_keeps_the_latest(fake_host: AsyncHost) -> None:
    """Snapshots of the future are the oldest ones."""
    await boot(fake_host)
    await schedule(fake_host, max_count=2)
    store = fake_host.local.rooms.store
    for hours in (100, 101):
        made = (await run(fake_host, time.time() + hours * HOUR_S))[-1]
        with store._db.write() as connection:
            connection.execute(
                "UPDATE snapshots SET created_at = ?1, record = CAST(json_set(CAST(record AS TEXT), "
                "'$.created_at', ?1) AS BLOB) "
                "WHERE id = ?2",
                (time.time() + hours * HOUR_S, made.id),
            )
    before = {each.id for each in await fake_host.call(SnapshotLsRequest())}
    third = await fake_host.call(SnapshotScheduleRequest(instance="oak"))
    found = {each.id for each in await run(fake_host, time.time())}
    latest = await fake_host.call(SnapshotScheduleRequest(instance="oak"))
    assert latest.last_snapshot not in (None, third.last_snapshot)
    assert latest.last_snapshot in found
    assert len(found & before) == 1
    found = {each.id for each in await run(fake_host, time.time() + 2 * HOUR_S)}
    assert latest.last_snapshot in found
    assert len(found) == 2
    assert not found & before


async def test_a_clock_that_was_set_back_makes_no_hot_loop(fake_host: AsyncHost) -> None:
    """Snapshots of a removed instance that are of the future are looked at again after their age."""
    oak = await boot(fake_host)
    await schedule(fake_host, max_count=None, max_age_s=2 * HOUR_S)
    await run(fake_host, time.time() + HOUR_S + 1)
    await fake_host.call(RmRequest(instance="oak"))
    now = time.time() - 1000 * HOUR_S
    await fake_host.local.group(Schedules).attend_schedule(oak.id, now)
    due, following = fake_host.local.rooms.store.supervised.schedules.due(now + 1, None)
    assert due == []
    assert following == pytest.approx(now + 2 * HOUR_S)


async def test_a_failed_removal_keeps_no_other_snapshot(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are removed nevertheless, and it is tried again after a minute."""
    await boot(fake_host)
    await schedule(fake_host, max_count=10)
    now = time.time()
    for number in (1, 2, 3):
        found = await run(fake_host, now + number * (HOUR_S + 1))
    await schedule(fake_host, max_count=1)
    remove = Schedules.snapshot_rm

    async def failing(self: Schedules, request: SnapshotRmRequest) -> None:
        if request.snapshot == found[0].id:
            raise HostCannot("cannot remove it (Input/output error)", hint="check the disk")
        await remove(self, request)

    monkeypatch.setattr(Schedules, "snapshot_rm", failing)
    at = now + 3.5 * HOUR_S
    assert {each.id for each in await run(fake_host, at)} == {found[0].id, found[2].id}
    due, following = fake_host.local.rooms.store.supervised.schedules.due(at, None)
    assert due == []
    assert following == pytest.approx(at + 60)


async def test_no_removal_waits_for_an_operation(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that uses the oldest snapshot may take minutes, and other schedules would wait too."""
    await boot(fake_host)
    await schedule(fake_host, max_count=10)
    now = time.time()
    for number in (1, 2, 3):
        found = await run(fake_host, now + number * (HOUR_S + 1))
    await schedule(fake_host, max_count=1)
    asked: list[str] = []
    remove = Schedules.snapshot_rm

    async def noted(self: Schedules, request: SnapshotRmRequest) -> None:
        asked.append(request.snapshot)
        await remove(self, request)

    monkeypatch.setattr(Schedules, "snapshot_rm", noted)
    lock = fake_host.local.rooms.layout.lock(found[0].id)
    async with locks.hold(lock, shared=True, what="test", deadline_s=SOON_S):
        await run(fake_host, now + 3.5 * HOUR_S)
    assert asked == [found[1].id]
    assert [each.id for each in await run(fake_host, now + 3.6 * HOUR_S)] == [found[2].id]


async def test_a_supervisor_that_begins_again_looks_at_all(fake_host: AsyncHost, clock: FakeClock) -> None:
    """Also at an instance whose look was cancelled before its first step, when the database could not be read."""
    watching = supervisor.Supervisor(fake_host.local, clock)
    watching._attend("a" * 24)
    watching._wake("b" * 24)
    await watching._end()
    assert (watching._attending, watching._waking) == ({}, {})


@pytest.mark.parametrize("change", ["replaced", "removed"])
async def test_a_schedule_that_changes_during_a_run_counts(
    fake_host: AsyncHost, other: AsyncHost, driver: FakeDriver, change: str
) -> None:
    """The run began with one that keeps a single snapshot. The new one keeps all."""
    await boot(fake_host)
    await schedule(fake_host)
    now = time.time()
    await run(fake_host, now + HOUR_S + 1)
    gate = driver.faults.hold_at("save")
    oak = (await other.call(SnapshotScheduleRequest(instance="oak"))).instance
    async with asyncio.timeout(SOON_S):
        task = asyncio.create_task(fake_host.local.group(Schedules).attend_schedule(oak, now + 2 * HOUR_S + 1))
        await gate.reached.wait()
        if change == "replaced":
            await schedule(other, max_count=10)
        else:
            await other.call(SnapshotScheduleRmRequest(instance="oak"))
        gate.release.set()
        await task
    assert len(await fake_host.call(SnapshotLsRequest())) == 2


async def test_two_supervisors_take_one_snapshot(fake_host: AsyncHost, other: AsyncHost, driver: FakeDriver) -> None:
    """One of the operator, and one of the owner: both see that it is due."""
    oak = await boot(fake_host)
    made = await schedule(fake_host, max_count=10)
    at = made.next_run_at + 1
    gate = driver.faults.hold_at("save")
    async with asyncio.timeout(SOON_S):
        first = asyncio.create_task(fake_host.local.group(Schedules).attend_schedule(oak.id, at))
        await gate.reached.wait()
        assert recorded.Schedules(fake_host.local.rooms.store._db).begin(made, at) is None
        gate.release.set()
        await first
    assert len(await fake_host.call(SnapshotLsRequest())) == 1


async def test_an_owners_supervisor_leaves_the_others_schedules(
    fake_host: AsyncHost, fake_home: Path, driver: FakeDriver, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It neither forgets them nor complains. Its own ones are carried out."""
    hosts = {
        owner: AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0, owner=owner)
        for owner in ("ann", "bob")
    }
    await fake_host.images.tag(IMAGE, IMAGE, public=True)
    async with contextlib.AsyncExitStack() as stack:
        ann, bob = [await stack.enter_async_context(host) for host in hosts.values()]
        store = fake_host.local.rooms.store.supervised.schedules
        kept = await boot(ann, "kept")
        gone = await boot(ann, "gone")
        for each in (kept, gone):
            await schedule(ann, each.name, max_count=None, max_age_s=2 * HOUR_S)
            await ann.local.group(Schedules).attend_schedule(each.id, time.time() + HOUR_S + 1)
        await ann.call(RmRequest(instance="gone"))
        await boot(bob, "elm")
        mine = await schedule(bob, "elm")
        async with supervised(bob, clock):
            clock.forward(10 * HOUR_S)
            async with asyncio.timeout(SOON_S):
                while not await bob.call(SnapshotLsRequest()):
                    pass
        assert store.get(gone.id) is not None
        assert [each for each in caplog.messages if "snapshot schedule" in each] == []
        assert set(store.due(clock.now() + HOUR_S, "ann")[0]) == {kept.id, gone.id}
        assert store.due(clock.now() + HOUR_S, "bob")[0] == [mine.instance]
        async with supervised(ann, clock), asyncio.timeout(SOON_S):
            while store.get(gone.id) is not None:
                await ann.call(SnapshotLsRequest())


async def test_snapshots_delay_nothing_else(
    fake_host: AsyncHost, driver: FakeDriver, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take long, and many can be due at once."""
    monkeypatch.setattr(supervisor, "_AT_ONCE", 1)
    await boot(fake_host)
    await boot(fake_host, "elm")
    await schedule(fake_host)
    await fake_host.call(UpdateRequest(instance="elm", ttl_s=2 * HOUR_S))
    gate = driver.faults.hold_at("save")
    async with supervised(fake_host, clock):
        clock.forward(HOUR_S + 5)
        async with asyncio.timeout(SOON_S):
            await gate.reached.wait()
        clock.forward(HOUR_S + 5)
        await until_removed(fake_host, "elm")
        gate.release.set()
