"""Snapshots by a schedule: taken in their rhythm, kept within limits, also after kills and removals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coppice.client import AsyncHost
from coppice.completion import in_thread
from coppice.errors import InvalidName, NotFound, UsageError
from coppice.host.schedules import Schedules
from coppice.model import Snapshot, SnapshotKind, State
from coppice.model.automation import SnapshotSchedule
from coppice.requests import (
    ForkRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotLsRequest,
    SnapshotRequest,
    SnapshotScheduleRequest,
    SnapshotScheduleRmRequest,
    SnapshotScheduleSetRequest,
    StandbyRequest,
)
from coppice.state import locks
from fakes.clock import FakeClock
from fakes.driver import FakeDriver
from fakes.hosting import boot, make
from fakes.supervising import SOON_S, supervised

HOUR_S = 3600.0


async def schedule(host: AsyncHost, name: str = "oak", **options: object) -> SnapshotSchedule:
    """Let snapshots be taken every hour, and the newest three be kept."""
    given = {"interval_s": HOUR_S, "max_count": 3, **options}
    return await host.call(SnapshotScheduleSetRequest(instance=name, **given))  # type: ignore[arg-type]


async def shown(host: AsyncHost, name: str = "oak") -> SnapshotSchedule:
    """Return the schedule of an instance."""
    return await host.call(SnapshotScheduleRequest(instance=name))


async def saved(host: AsyncHost) -> list[Snapshot]:
    """Return all snapshots, the oldest first."""
    return await host.call(SnapshotLsRequest())


async def until(host: AsyncHost, wanted: Callable[[list[Snapshot]], bool]) -> list[Snapshot]:
    """Wait until the snapshots are as wanted: no event tells it."""
    async with asyncio.timeout(SOON_S):
        while not wanted(found := await saved(host)):
            pass
    return found


async def until_run(host: AsyncHost, at: float) -> SnapshotSchedule:
    """Wait until the run that began at a time has its outcome."""
    async with asyncio.timeout(SOON_S):
        while (found := await shown(host)).last_run_at != at or not (found.last_snapshot or found.last_error):
            pass
    return found


async def until_forgotten(host: AsyncHost, key: str) -> None:
    """Wait until the schedule of a removed instance is forgotten."""
    async with asyncio.timeout(SOON_S):
        while await in_thread(host.local.rooms.store.supervised.schedules.get, key) is not None:
            pass


async def test_snapshots_are_taken_in_their_rhythm(fake_host: AsyncHost, other: AsyncHost, clock: FakeClock) -> None:
    """Of a running machine, one in standby and a stopped one. The newest are kept, and those made by hand."""
    async with supervised(fake_host, clock):
        oak = await boot(other, "oak")
        by_hand = await other.call(SnapshotRequest(instance="oak", name="mine"))
        made = await schedule(other, name_prefix="nightly", tags={"by": "schedule"})
        assert made.next_run_at == pytest.approx(clock.now() + HOUR_S, abs=5)
        clock.forward(HOUR_S - 60)
        assert await saved(other) == [by_hand]
        clock.forward(90)
        _, first = await until(other, lambda found: len(found) == 2)
        assert (first.kind, first.source, first.tags) == (SnapshotKind.STANDBY, oak.id, {"by": "schedule"})
        assert first.name.startswith("nightly-")
        seen = await until_run(other, clock.now())
        assert (seen.last_snapshot, seen.last_error) == (first.id, "")
        assert seen.next_run_at == pytest.approx(made.next_run_at + HOUR_S)
        await other.call(StandbyRequest(instance="oak"))
        for count in (3, 4, 4, 4):  # the third that is kept is the last that grows the list
            newest = (await saved(other))[-1]
            clock.forward(HOUR_S)
            found = await until(other, lambda found, newest=newest: found[-1].id != newest.id)  # type: ignore[misc]
            found = await until(other, lambda found, count=count: len(found) == count)  # type: ignore[misc]
        assert found[0] == by_hand
        assert first.id not in {each.id for each in found}
        assert (await other.call(RestoreRequest(instance="oak"))).state is State.RUNNING


async def test_a_stopped_machine_gives_snapshots_of_its_disk(fake_host: AsyncHost, clock: FakeClock) -> None:
    """And its name begins theirs."""
    await make(fake_host, State.STOPPED)
    await schedule(fake_host)
    async with supervised(fake_host, clock):
        clock.forward(HOUR_S + 5)
        (found,) = await until(fake_host, lambda found: len(found) == 1)
    assert (found.kind, found.name[:4]) == (SnapshotKind.STOPPED, "oak-")


async def test_missed_runs_are_left_out(fake_host: AsyncHost, clock: FakeClock) -> None:
    """After a time without a supervisor there is one snapshot, and the rhythm stays."""
    await boot(fake_host)
    made = await schedule(fake_host)
    clock.forward(5.5 * HOUR_S)
    async with supervised(fake_host, clock):
        seen = await until_run(fake_host, clock.now())
    assert len(await saved(fake_host)) == 1
    assert seen.next_run_at == pytest.approx(made.next_run_at + 5 * HOUR_S)


async def test_a_killed_run_is_not_repeated(fake_host: AsyncHost, clock: FakeClock, driver: FakeDriver) -> None:
    """It is recorded before its snapshot. The next one comes at its time."""
    await boot(fake_host)
    await schedule(fake_host)
    clock.forward(HOUR_S + 5)
    gate = driver.faults.hold_at("save")
    async with supervised(fake_host, clock), asyncio.timeout(SOON_S):
        await gate.reached.wait()
    gate.release.set()
    begun = await shown(fake_host)
    assert (begun.last_run_at, begun.last_snapshot) == (clock.now(), None)
    async with supervised(fake_host, clock):
        clock.forward(HOUR_S)
        await until_run(fake_host, clock.now())
    assert len(await saved(fake_host)) == 1


async def test_a_failed_run_is_told(fake_host: AsyncHost, clock: FakeClock, driver: FakeDriver) -> None:
    """It leaves nothing, the next one comes at its time, and its success clears the error."""
    await boot(fake_host)
    await schedule(fake_host)
    async with supervised(fake_host, clock):
        driver.faults.fail_at("save")
        clock.forward(HOUR_S + 5)
        assert (await until_run(fake_host, clock.now())).last_error
        assert await saved(fake_host) == []
        clock.forward(HOUR_S)
        await until(fake_host, lambda found: len(found) == 1)
        async with asyncio.timeout(SOON_S):
            while (found := await shown(fake_host)).last_error:
                pass
        assert found.last_snapshot


async def test_old_snapshots_are_removed(fake_host: AsyncHost, clock: FakeClock) -> None:
    """At their age, not at the next run; and none that was made by hand."""
    await boot(fake_host)
    await fake_host.call(SnapshotRequest(instance="oak", name="mine"))
    await schedule(fake_host, interval_s=10 * HOUR_S, max_count=None, max_age_s=12 * HOUR_S)
    async with supervised(fake_host, clock):
        clock.forward(10 * HOUR_S + 5)
        await until(fake_host, lambda found: len(found) == 2)
        ran = await until_run(fake_host, clock.now())
        clock.forward(3 * HOUR_S)  # its time of making is real, so that it is 13 hours old
        await until(fake_host, lambda found: [each.name for each in found] == ["mine"])
        assert await shown(fake_host) == ran


async def test_a_removed_machines_snapshots_wait_for_their_age(fake_host: AsyncHost, clock: FakeClock) -> None:
    """Then their schedule is forgotten too. Without an age it is forgotten at once, and they stay."""
    kept: dict[str, str] = {}
    for name, limits in (("oak", {"max_age_s": 5 * HOUR_S, "max_count": None}), ("elm", {})):
        kept[name] = (await boot(fake_host, name)).id
        await schedule(fake_host, name, **limits)
    async with supervised(fake_host, clock):
        clock.forward(HOUR_S + 5)
        await until(fake_host, lambda found: len(found) == 2)
        for name in kept:
            await fake_host.call(RmRequest(instance=name))
        clock.forward(HOUR_S)
        schedules = fake_host.local.rooms.store.supervised.schedules
        await until_forgotten(fake_host, kept["elm"])
        assert {each.source_name for each in await saved(fake_host)} == {"oak", "elm"}
        assert schedules.get(kept["oak"]) is not None
        clock.forward(4 * HOUR_S)
        await until(fake_host, lambda found: [each.source_name for each in found] == ["elm"])
        await until_forgotten(fake_host, kept["oak"])


async def test_a_changed_schedule_counts_at_once(fake_host: AsyncHost, clock: FakeClock) -> None:
    """Other limits keep the time of the next run and remove what is too much; another interval begins anew."""
    await boot(fake_host)
    made = await schedule(fake_host)
    async with supervised(fake_host, clock):
        for count in (1, 2):
            clock.forward(HOUR_S + 1)
            newest = (await until(fake_host, lambda found, count=count: len(found) == count))[-1]  # type: ignore[misc]
            async with asyncio.timeout(SOON_S):
                while (await shown(fake_host)).last_snapshot != newest.id:
                    pass
        changed = await schedule(fake_host, max_count=1, name_prefix="other")
        assert changed.next_run_at == pytest.approx(made.next_run_at + 2 * HOUR_S)
        assert (changed.created_at, changed.last_snapshot) == (made.created_at, newest.id)
        assert await until(fake_host, lambda found: len(found) == 1) == [newest]
        again = await schedule(fake_host, interval_s=2 * HOUR_S)
        assert again.next_run_at == pytest.approx(again.updated_at + 2 * HOUR_S)


async def test_a_clock_that_is_set_back_delays_no_snapshot(fake_host: AsyncHost, clock: FakeClock) -> None:
    """By more than one interval."""
    await boot(fake_host)
    async with supervised(fake_host, clock):
        clock.forward(100 * HOUR_S)
        await schedule(fake_host)
        clock.forward(HOUR_S)
        await until_run(fake_host, clock.now())
        clock.back(50 * HOUR_S)
        clock.forward(HOUR_S)
        await until_run(fake_host, clock.now())
        assert (await shown(fake_host)).next_run_at <= clock.now() + HOUR_S


async def test_a_snapshot_in_use_is_removed_later(fake_host: AsyncHost, clock: FakeClock) -> None:
    """When it is free again."""
    await boot(fake_host)
    await schedule(fake_host, max_count=1)
    layout = fake_host.local.rooms.layout
    async with supervised(fake_host, clock):
        clock.forward(HOUR_S + 1)
        (first,) = await until(fake_host, lambda found: len(found) == 1)
        await until_run(fake_host, clock.now())
        async with locks.hold(layout.lock(first.id), shared=True, what="test", deadline_s=SOON_S):
            clock.forward(HOUR_S)
            await until(fake_host, lambda found: len(found) == 2)
        clock.forward(120)
        await until(fake_host, lambda found: len(found) == 1 and found[0].id != first.id)


async def test_forks_inherit_no_schedule(fake_host: AsyncHost) -> None:
    """Neither of an instance nor of a scheduled snapshot."""
    await make(fake_host, State.STANDBY)
    await schedule(fake_host)
    group = fake_host.local.group(Schedules)
    await group.attend_schedule((await shown(fake_host)).instance, (await shown(fake_host)).next_run_at)
    (snapshot,) = await saved(fake_host)
    for fork in (
        await fake_host.call(ForkRequest(instance="oak", names=["elm"])),
        await fake_host.call(SnapshotForkRequest(snapshot=snapshot.id, names=["ash"])),
    ):
        with pytest.raises(NotFound, match="no snapshot schedule"):
            await shown(fake_host, fork.instances[0].name)


async def test_a_schedule_can_be_removed(fake_host: AsyncHost, clock: FakeClock) -> None:
    """Once. Its snapshots stay."""
    await boot(fake_host)
    await schedule(fake_host)
    async with supervised(fake_host, clock):
        clock.forward(HOUR_S + 1)
        await until_run(fake_host, clock.now())
        await fake_host.call(SnapshotScheduleRmRequest(instance="oak"))
        with pytest.raises(NotFound, match="no snapshot schedule"):
            await fake_host.call(SnapshotScheduleRmRequest(instance="oak"))
        clock.forward(10 * HOUR_S)
    assert len(await saved(fake_host)) == 1


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"interval_s": 59.0}, UsageError),
        ({"interval_s": float("nan")}, UsageError),
        ({"interval_s": 1e12}, UsageError),
        ({"max_count": None}, UsageError),
        ({"max_count": 0}, UsageError),
        ({"max_count": -1}, UsageError),
        ({"max_age_s": -1.0}, UsageError),
        ({"max_age_s": 1e12}, UsageError),
        ({"name_prefix": "x" * 48}, UsageError),
        ({"name_prefix": "Not a name"}, InvalidName),
        ({"tags": {"": ""}}, UsageError),
    ],
)
async def test_a_schedule_is_checked(fake_host: AsyncHost, wrong: dict[str, Any], error: type[Exception]) -> None:
    """At once, and not at its first run."""
    await boot(fake_host)
    with pytest.raises(error):
        await schedule(fake_host, **wrong)
    with pytest.raises(NotFound):
        await shown(fake_host)
