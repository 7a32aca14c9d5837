"""Admission: an operation that exceeds a budget is refused at once and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import NoSpace, UsageError
from coppice.host.admission import demand_of_forks
from coppice.host.lifecycle import Lifecycle
from coppice.machine import disks
from coppice.machine.disk import bytes_of_fork
from coppice.model import GIB, MIB, Budgets, State
from coppice.requests import (
    FanOut,
    ForkRequest,
    GetRequest,
    RestoreRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartAheadRequest,
    StartRequest,
    StopRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, boot, make, snapshot
from fakes.pids import ended
from fakes.records import MEMORY_BYTES
from fakes.rooms import DEADLINES, open_rooms

ONE = MEMORY_BYTES + 32 * MIB  # the memory that one machine counts for without over-commit
ROOMY = Budgets(max_instances=100, memory_bytes=100 * ONE, memory_overcommit=1.0, disk_floor_bytes=0)
Opener = Callable[..., Awaitable[AsyncHost]]


@pytest.fixture
async def opened(driver: FakeDriver, fake_home: Path) -> AsyncIterator[Opener]:
    """Open hosts over one data directory, each with its own budgets."""
    async with AsyncExitStack() as stack:

        async def open_host(**changes: float) -> AsyncHost:
            budgets = msgspec.structs.replace(ROOMY, **changes)
            host = AsyncHost(
                fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, budgets=budgets, spares=0
            )
            return await stack.enter_async_context(host)

        yield open_host


async def refused(host: AsyncHost, work: Awaitable[object], match: str) -> NoSpace:
    """Check that a budget refuses the work with status 5 and a hint, and that nothing changes."""
    before = snapshot(host)
    with pytest.raises(NoSpace, match=match) as caught:
        await work
    assert snapshot(host) == before
    assert caught.value.exit_code == 5
    assert caught.value.hint
    return caught.value


async def test_too_many_instances(opened: Opener) -> None:
    """A fan-out gets all of its instances or none: the limit can be reached, not exceeded.

    The target state makes no difference.
    """
    host = await opened(max_instances=3)
    await make(host, State.TEMPLATE)
    for target in (State.RUNNING, State.STANDBY, State.STOPPED):
        await refused(host, host.call(ForkRequest(instance="oak", count=3, target=target)), "instances to 4")
    assert (await host.call(ForkRequest(instance="oak", count=2, target=State.STANDBY))).succeeded == 2
    error = await refused(host, boot(host, "elm", start=False), r"instances to 4 \(the limit is 3\)")
    assert "max_instances" in str(error)


async def test_too_much_memory(opened: Opener) -> None:
    """A running machine counts with its full RAM and a parked one with nothing.

    Every operation that starts a machine checks the budget.
    """
    host = await opened(memory_bytes=2 * ONE)
    await make(host, State.STANDBY)
    await make(host, State.STOPPED, "ash")
    await refused(host, host.call(ForkRequest(instance="oak", count=3)), "memory")
    elm, fir = (await host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2, atomic=True))).instances
    assert (await host.budget()).memory_bytes == 2 * ONE
    for work in (
        host.call(ForkRequest(instance="oak")),
        host.call(RestoreRequest(instance="oak")),
        host.call(StartRequest(instance="ash")),
        boot(host, "yew"),
    ):
        await refused(host, work, "memory")
    await refused(host, host.call(ForkRequest(instance="elm", from_running=True)), "memory")
    await host.call(StandbyRequest(instance=elm.id))
    await host.call(RestoreRequest(instance="oak"))
    await host.call(StopRequest(instance=fir.id))
    await host.call(StartRequest(instance="ash"))
    await assert_tidy(host, "oak", "ash", "elm", "fir")


async def test_operations_on_snapshots_are_admitted_too(opened: Opener, fake_home: Path) -> None:
    """Forks of a snapshot count like any fork.

    A snapshot of a running fork may write all of its RAM, and a restore that starts the machine
    needs its memory.
    """
    host = await opened(memory_bytes=2 * ONE, max_instances=4)
    await make(host, State.STANDBY)
    await host.call(SnapshotRequest(instance="oak", name="noon"))
    await refused(
        host, host.call(SnapshotForkRequest(snapshot="noon", count=4, target=State.STANDBY)), "instances to 5"
    )
    await refused(host, host.call(SnapshotForkRequest(snapshot="noon", count=3)), "memory")
    assert (await host.call(SnapshotForkRequest(snapshot="noon", count=2, names=["elm", "ash"]))).succeeded == 2
    await refused(host, host.call(SnapshotRestoreRequest(snapshot="noon", start=True)), "memory")
    disk = os.statvfs(fake_home)
    host = await opened(disk_floor_bytes=disk.f_bavail * disk.f_frsize - MEMORY_BYTES // 2)
    await refused(host, host.call(SnapshotRequest(instance="elm")), "floor")


async def test_over_commit_divides_the_memory_that_counts(opened: Opener) -> None:
    """A fork counts with its RAM divided by the factor, plus the VMM's own memory."""
    one = MEMORY_BYTES // 16 + 32 * MIB
    host = await opened(memory_bytes=4 * one, memory_overcommit=16.0)
    await make(host, State.TEMPLATE)
    await refused(host, host.call(ForkRequest(instance="oak", count=5)), "memory")
    assert (await host.call(ForkRequest(instance="oak", count=4))).succeeded == 4
    assert (await host.budget()).memory_bytes == 4 * one


async def test_the_floor_of_the_disk_is_kept(opened: Opener, driver: FakeDriver, fake_home: Path) -> None:
    """A boot may fill the file of its RAM, and a capture of RAM without a file may write all of it.

    Both are refused if they could use space below the floor.
    """
    roomy = await opened()
    await make(roomy, State.TEMPLATE)
    await roomy.call(ForkRequest(instance="oak", names=["elm"], atomic=True))
    await make(roomy, State.STOPPED, "ash")
    disk = os.statvfs(fake_home)
    host = await opened(disk_floor_bytes=disk.f_bavail * disk.f_frsize - MEMORY_BYTES // 2)
    await refused(host, host.call(StandbyRequest(instance="elm")), "floor")
    if driver.capabilities.boots_in_file:
        for work in (boot(host, "yew"), host.call(StartRequest(instance="ash"))):
            await refused(host, work, "floor")
    else:
        await host.call(StartRequest(instance="ash"))
        await refused(host, host.call(StandbyRequest(instance="ash")), "floor")
    assert (await host.call(GetRequest(instance="elm"))).state is State.RUNNING
    assert (
        await host.call(ForkRequest(instance="oak", target=State.STANDBY))
    ).succeeded == 1  # this fork only makes links


async def test_forks_that_copy_are_counted(opened: Opener, fake_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reflinks each fork writes a layer, or copies the allocated blocks of its source's disk,
    so too many forks are refused. With reflinks they are admitted.
    """
    roomy = await opened()
    source = await make(roomy, State.TEMPLATE)
    driver = roomy.local.rooms.driver(source)
    each = bytes_of_fork(roomy.local.rooms.directory(source.id), disks.of(source)[0], (driver, driver))
    assert each > 0
    disk = os.statvfs(fake_home)
    many = 32 * MIB // each + 1
    host = await opened(disk_floor_bytes=disk.f_bavail * disk.f_frsize - 16 * MIB, max_instances=many + 1)
    monkeypatch.setattr("coppice.host.admission._has_reflinks", lambda _: False)
    await refused(
        host, host.call(ForkRequest(instance="oak", count=many, target=State.STANDBY)), f"these {many} forks may write"
    )
    monkeypatch.setattr("coppice.host.admission._has_reflinks", lambda _: True)
    check = await host.local.group(Lifecycle)._admit(
        partial(demand_of_forks, host.local.rooms, source, FanOut(count=many, target=State.STANDBY))
    )
    check()


async def test_spares_are_admitted_and_give_way(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare's disk counts when the spare is made, not again when it becomes a fork.

    Spares are removed when a requested fork needs their room.
    """
    host = await opened()
    await make(host, State.TEMPLATE)
    monkeypatch.setattr("coppice.host.admission._has_reflinks", lambda _: False)
    monkeypatch.setattr("coppice.machine.disk.bytes_of_fork", lambda *_: 64 * MIB)
    disk = os.statvfs(host.home)
    tight = msgspec.structs.replace(ROOMY, disk_floor_bytes=disk.f_bavail * disk.f_frsize - 32 * MIB)
    monkeypatch.setattr(host.local, "_budgets", tight)
    await refused(host, host.call(StartAheadRequest(instance="oak")), "floor")
    monkeypatch.setattr(host.local, "_budgets", ROOMY)
    assert await host.call(StartAheadRequest(instance="oak", count=2)) == 2
    monkeypatch.setattr(host.local, "_budgets", tight)
    (result,) = (await host.call(ForkRequest(instance="oak", names=["elm"]))).results
    assert result.started_ahead
    with pytest.raises(NoSpace, match="floor"):
        await host.call(ForkRequest(instance="oak", count=2))
    await host.local.group(Lifecycle)._spare().settled()
    await assert_tidy(host, "oak", "elm")
    monkeypatch.setattr(host.local, "_budgets", ROOMY)
    assert await host.call(StartAheadRequest(instance="oak")) == 1
    monkeypatch.setattr(host.local, "_budgets", msgspec.structs.replace(ROOMY, max_instances=2))
    with pytest.raises(NoSpace, match="instances"):
        await host.call(StartAheadRequest(instance="oak", count=2))
    with pytest.raises(NoSpace, match="instances"):
        await boot(host, "ash")
    await assert_tidy(host, "oak", "elm")


async def test_concurrent_hosts_cannot_exceed_a_budget(opened: Opener) -> None:
    """Hosts that ask at the same moment share one limit, because each checks the budget in the
    transaction that records its instances.
    """
    hosts = [await opened(max_instances=5) for _ in range(4)]
    await make(hosts[0], State.TEMPLATE)
    outcomes = await asyncio.gather(
        *(host.call(ForkRequest(instance="oak", count=2, target=State.STANDBY)) for host in hosts),
        return_exceptions=True,
    )
    assert len([outcome for outcome in outcomes if isinstance(outcome, NoSpace)]) == 2
    assert len(await hosts[0].ls()) == 5


async def test_machines_that_ended_do_not_count(opened: Opener) -> None:
    """A machine that ended unseen frees its place for the next one at once."""
    host = await opened(memory_bytes=ONE)
    oak = await boot(host, "oak")
    assert oak.vmm is not None
    os.kill(oak.vmm.pid, signal.SIGKILL)
    await ended(oak.vmm)
    await boot(host, "elm")
    assert (await host.call(GetRequest(instance="oak"))).state is State.STOPPED


async def test_budgets_are_read_when_the_data_directory_is_opened(
    driver: FakeDriver, fake_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment takes precedence over config.toml.

    An unknown key keeps the host from opening.
    """
    config = fake_home / "config.toml"
    config.write_text('[budgets]\nmax_instances = 7\nmemory = "3G"\n')
    monkeypatch.setenv("COPPICE_MAX_INSTANCES", "8")
    host = AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)
    async with host:
        assert (host.local.budgets.max_instances, host.local.budgets.memory_bytes) == (8, 3 * GIB)
        use = await host.budget()
        assert (use.instances, use.max_instances, use.running, use.memory_bytes) == (0, 8, 0, 0)
    config.write_text("[budgets]\nmax_instance = 7\n")
    with pytest.raises(UsageError, match="max_instance"):
        await AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0).open()
