"""Admission: what does not fit into the budgets is refused at once, with what to do, and nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from coppice.errors import NoSpace, UsageError
from coppice.fork.plan import ForkRequest
from coppice.host import AsyncHost
from coppice.host.admission import demand_of_forks
from coppice.model import GIB, MIB, Budgets, State
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, boot, make, snapshot
from fakes.pids import ended
from fakes.records import MEMORY_BYTES
from fakes.rooms import DEADLINES, open_rooms

ONE = MEMORY_BYTES + 32 * MIB  # what a machine counts for, without over-commit
ROOMY = Budgets(max_instances=100, memory_bytes=100 * ONE, memory_overcommit=1.0, disk_floor_bytes=0)
Opener = Callable[..., Awaitable[AsyncHost]]


@pytest.fixture
async def opened(driver: FakeDriver, fake_home: Path) -> AsyncIterator[Opener]:
    """Opens hosts over one data directory, each with the budgets that it is given."""
    async with AsyncExitStack() as stack:

        async def open_host(**changes: float) -> AsyncHost:
            budgets = msgspec.structs.replace(ROOMY, **changes)
            host = AsyncHost(
                fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, budgets=budgets, spares=0
            )
            return await stack.enter_async_context(host)

        yield open_host


async def refused(host: AsyncHost, work: Awaitable[object], match: str) -> NoSpace:
    """The work is refused by a budget, with exit status 5 and a hint, and all is as before."""
    before = snapshot(host)
    with pytest.raises(NoSpace, match=match) as caught:
        await work
    assert snapshot(host) == before
    assert caught.value.exit_code == 5
    assert caught.value.hint
    return caught.value


async def test_too_many_instances(opened: Opener) -> None:
    """All of a fan-out or nothing: the last place is given, and not one more, whatever the state that is asked for."""
    host = await opened(max_instances=3)
    await make(host, State.TEMPLATE)
    for target in (State.RUNNING, State.STANDBY, State.STOPPED):
        await refused(host, host.fork("oak", count=3, target=target), "4 instances")
    assert (await host.fork("oak", count=2, target=State.STANDBY)).succeeded == 2
    error = await refused(host, boot(host, "elm", start=False), "4 instances, and 3 are the most")
    assert "max_instances" in str(error)


async def test_too_much_memory(opened: Opener) -> None:
    """What runs counts for its worst case; what is parked does not. Every way to run a machine is guarded."""
    host = await opened(memory_bytes=2 * ONE)
    await make(host, State.STANDBY)
    await make(host, State.STOPPED, "ash")
    await refused(host, host.fork("oak", count=3), "memory")
    elm, fir = (await host.fork("oak", names=["elm", "fir"], count=2, atomic=True)).instances
    assert (await host.budget()).memory_bytes == 2 * ONE
    for work in (host.fork("oak"), host.restore("oak"), host.start("ash"), boot(host, "yew")):
        await refused(host, work, "memory")
    await refused(host, host.fork("elm", from_running=True), "memory")
    await host.standby(elm)
    await host.restore("oak")
    await host.stop(fir)
    await host.start("ash")
    await assert_tidy(host, "oak", "ash", "elm", "fir")


async def test_snapshots_are_asked_for_too(opened: Opener, fake_home: Path) -> None:
    """Forks of a snapshot count as any; keeping a running fork may write all of its RAM, taking one back to run needs its memory."""
    host = await opened(memory_bytes=2 * ONE, max_instances=4)
    await make(host, State.STANDBY)
    await host.snapshot_create("oak", name="noon")
    await refused(host, host.snapshot_fork("noon", count=4, target=State.STANDBY), "5 instances")
    await refused(host, host.snapshot_fork("noon", count=3), "memory")
    assert (await host.snapshot_fork("noon", count=2, names=["elm", "ash"])).succeeded == 2
    await refused(host, host.snapshot_restore("noon", start=True), "memory")
    disk = os.statvfs(fake_home)
    host = await opened(disk_floor_bytes=disk.f_bavail * disk.f_frsize - MEMORY_BYTES // 2)
    await refused(host, host.snapshot_create("elm"), "floor")


async def test_over_commit_is_counted_on(opened: Opener) -> None:
    """A fork is taken to need its RAM divided by the factor, and its VMM's own memory."""
    one = MEMORY_BYTES // 16 + 32 * MIB
    host = await opened(memory_bytes=4 * one, memory_overcommit=16.0)
    await make(host, State.TEMPLATE)
    await refused(host, host.fork("oak", count=5), "memory")
    assert (await host.fork("oak", count=4)).succeeded == 4
    assert (await host.budget()).memory_bytes == 4 * one


async def test_the_floor_of_the_disk_is_kept(opened: Opener, fake_home: Path) -> None:
    """A boot may fill its RAM's file, a capture of a fork may write all of its RAM; with less above the floor both are refused."""
    roomy = await opened()
    await make(roomy, State.TEMPLATE)
    await roomy.fork("oak", names=["elm"], atomic=True)
    await make(roomy, State.STOPPED, "ash")
    disk = os.statvfs(fake_home)
    host = await opened(disk_floor_bytes=disk.f_bavail * disk.f_frsize - MEMORY_BYTES // 2)
    for work in (boot(host, "yew"), host.start("ash"), host.standby("elm")):
        await refused(host, work, "floor")
    assert (await host.get("elm")).state is State.RUNNING
    assert (await host.fork("oak", target=State.STANDBY)).succeeded == 1  # it links


async def test_forks_that_copy_are_counted(opened: Opener, fake_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reflinks each fork copies what its source's disk has allocated: too many of them are refused, with them not."""
    roomy = await opened()
    source = await make(roomy, State.TEMPLATE)
    overlay = roomy.rooms.directory(source.id) / "overlay.raw"
    allocated = overlay.stat().st_blocks * 512
    assert allocated > 0
    disk = os.statvfs(fake_home)
    many = 32 * MIB // allocated + 1
    host = await opened(disk_floor_bytes=disk.f_bavail * disk.f_frsize - 16 * MIB, max_instances=many + 1)
    monkeypatch.setattr("coppice.host.admission._has_reflinks", lambda _: False)
    await refused(host, host.fork("oak", count=many, target=State.STANDBY), f"these {many} forks may write")
    monkeypatch.setattr("coppice.host.admission._has_reflinks", lambda _: True)
    check = await host._admit(demand_of_forks(host.rooms, source, ForkRequest(count=many, target=State.STANDBY)))
    check()


async def test_what_is_started_ahead_has_room(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its disk is copied when it is made, and counted then, and not again when it becomes a fork; it goes where there is no room for what is asked for."""
    host = await opened()
    await make(host, State.TEMPLATE)
    monkeypatch.setattr("coppice.host.admission._has_reflinks", lambda _: False)
    monkeypatch.setattr("coppice.instance.directory.overlay_bytes", lambda _: 64 * MIB)
    disk = os.statvfs(host.home)
    tight = msgspec.structs.replace(ROOMY, disk_floor_bytes=disk.f_bavail * disk.f_frsize - 32 * MIB)
    monkeypatch.setattr(host, "_budgets", tight)
    await refused(host, host.start_ahead("oak"), "floor")
    monkeypatch.setattr(host, "_budgets", ROOMY)
    assert await host.start_ahead("oak", 2) == 2
    monkeypatch.setattr(host, "_budgets", tight)
    (result,) = (await host.fork("oak", names=["elm"])).results
    assert result.started_ahead
    with pytest.raises(NoSpace, match="floor"):
        await host.fork("oak", count=2)
    await host._spare().settled()
    await assert_tidy(host, "oak", "elm")
    monkeypatch.setattr(host, "_budgets", ROOMY)
    assert await host.start_ahead("oak") == 1
    monkeypatch.setattr(host, "_budgets", msgspec.structs.replace(ROOMY, max_instances=2))
    with pytest.raises(NoSpace, match="instances"):
        await host.start_ahead("oak", 2)
    with pytest.raises(NoSpace, match="instances"):
        await boot(host, "ash")
    await assert_tidy(host, "oak", "elm")


async def test_the_last_place_is_given_once(opened: Opener) -> None:
    """Hosts that ask at the same moment: the budget is looked at in the transaction that takes from it."""
    hosts = [await opened(max_instances=5) for _ in range(4)]
    await make(hosts[0], State.TEMPLATE)
    outcomes = await asyncio.gather(
        *(host.fork("oak", count=2, target=State.STANDBY) for host in hosts), return_exceptions=True
    )
    assert len([outcome for outcome in outcomes if isinstance(outcome, NoSpace)]) == 2
    assert len(await hosts[0].ls()) == 5


async def test_the_dead_do_not_count(opened: Opener) -> None:
    """A machine that ended unseen gives its place to the next one at once."""
    host = await opened(memory_bytes=ONE)
    oak = await boot(host, "oak")
    assert oak.vmm is not None
    os.kill(oak.vmm.pid, signal.SIGKILL)
    await ended(oak.vmm)
    await boot(host, "elm")
    assert (await host.get("oak")).state is State.STOPPED


async def test_budgets_are_read_when_the_data_directory_is_opened(
    driver: FakeDriver, fake_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.toml, and before it the environment; what cannot be understood keeps the host from opening."""
    config = fake_home / "config.toml"
    config.write_text('[budgets]\nmax_instances = 7\nmemory = "3G"\n')
    monkeypatch.setenv("COPPICE_MAX_INSTANCES", "8")
    host = AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)
    async with host:
        assert (host.budgets.max_instances, host.budgets.memory_bytes) == (8, 3 * GIB)
        use = await host.budget()
        assert (use.instances, use.max_instances, use.running, use.memory_bytes) == (0, 8, 0, 0)
    config.write_text("[budgets]\nmax_instance = 7\n")
    with pytest.raises(UsageError, match="max_instance"):
        await AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0).open()
