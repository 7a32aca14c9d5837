"""What can go wrong between two lines: a commit that is cancelled, an error of the operating system, a file that is gone, a guest that means harm."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import HostFactory
from coppice.errors import IntegrityError, NoSpace, UsageError, VmmError, VmmTimeout
from coppice.host import AsyncHost
from coppice.instance import capture, destroy, recovery
from coppice.instance.rooms import Rooms
from coppice.model import Instance, Publish, State
from coppice.store import locks
from coppice.store.store import Store
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch
from coppice.vmm.process import start_ticks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make
from fakes.records import make_instance
from fakes.rooms import DEADLINES, open_rooms

# Captures


async def test_a_commit_that_is_cancelled_is_a_commit(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest does not run for one instant after it: a host that then died would take a capture for whole whose disk has moved on."""
    await boot(fake_host)
    store, loop = fake_host.rooms.store, asyncio.get_running_loop()
    begin = store.begin

    def cancelled_commit(instance: Instance, operation: str) -> None:
        begin(instance, operation)
        if operation == capture.COMMITTED:
            loop.call_soon_threadsafe(task.cancel)

    monkeypatch.setattr(store, "begin", cancelled_commit)
    task = asyncio.create_task(fake_host.standby("oak"))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert driver.faults.reached["resume"] == 0
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY


async def test_the_disk_of_a_capture_survives_a_power_cut(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mem-file is synced; without the disk of the same instant it would be restored onto a file system that it does not know."""
    oak = await boot(fake_host)
    synced: set[int] = set()
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    await fake_host.standby("oak")
    directory = fake_host.rooms.directory(oak.id)
    for name in (files.MEMORY, files.VMSTATE, files.OVERLAY_DISK):
        assert (directory / name).stat().st_ino in synced


@pytest.mark.parametrize("source", [State.TEMPLATE, State.RUNNING])
async def test_a_fork_that_is_kept_survives_a_power_cut(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, source: State
) -> None:
    """Its record can be durable at any moment, as by the sync of another's: memory or disk with holes in them would then be taken for whole."""
    await make(fake_host, source)
    store, save, fsync = fake_host.rooms.store, fake_host.rooms.store.save, os.fsync
    synced: set[int] = set()
    synced_before: dict[str, set[int]] = {}

    def recorded(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def saved(instance: Instance, *, done: bool = False) -> None:
        synced_before[instance.name] = set(synced)
        save(instance, done=done)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(store, "save", saved)
    running = source is State.RUNNING
    report = await fake_host.fork("oak", names=["elm"], target=State.STANDBY, from_running=running)
    (elm,) = report.instances
    directory = fake_host.rooms.directory(elm.id)
    for path in (directory, *(directory / name for name in (files.MEMORY, files.VMSTATE, files.OVERLAY_DISK))):
        assert path.stat().st_ino in synced_before["elm"], path


async def test_a_guest_that_cannot_be_resumed_is_said_to_be_paused(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """It is not called Running while its CPUs stand still; capturing and restoring it lets it run on."""
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    driver.faults.fail_at("save_devices")
    driver.faults.fail_at("resume", error=lambda: VmmTimeout("it does not answer", hint="wait"))
    with pytest.raises(Exception, match="save_devices is planned to fail"):
        await fake_host.standby("oak")
    assert (await fake_host.get("oak")).state is State.PAUSED
    await fake_host.standby("oak")
    await fake_host.restore("oak")
    assert await ask(fake_host, "oak", "recall", "key") == "value"


async def test_a_command_that_never_notices_the_end_keeps_nobody_from_a_restore(fake_host: AsyncHost) -> None:
    """`coppice exec vm -- yes | less` does not read its port while nobody scrolls, and holds its lock long after the VMM is gone."""
    oak = await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    port = os.open(fake_host.rooms.directory(oak.id) / "port1.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(port, fcntl.LOCK_EX)
        standby, _ = await fake_host.standby("oak")
        assert standby.open_ports == (1,)
        async with asyncio.timeout(DEADLINES.ready / 2):
            await fake_host.restore("oak")
    finally:
        os.close(port)
    assert await ask(fake_host, "oak", "recall", "key") == "value"


# Errors of the operating system


def no_room() -> OSError:
    """What a full disk says where nobody has translated it yet."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_full_disk_takes_one_fork_and_not_its_siblings(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A log, a socket, a lock: any of them may find no room. That is a child's own failure, with the error that says so."""
    await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at("restore", nth=2, error=no_room)
    report = await fake_host.fork("oak", names=["elm", "fir", "yew"], count=3)
    assert sorted(result.error_code or "" for result in report.results) == ["", "", NoSpace.code]
    await assert_tidy(fake_host, "oak", *(instance.name for instance in report.instances))


async def test_a_fork_without_room_for_its_lock_leaves_nothing(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is recorded before it is held: its name and its place in the budgets are free again at once, not only when this process has ended."""
    oak = await make(fake_host, State.TEMPLATE)
    own, try_lock = fake_host.rooms.layout.lock(oak.id), locks.try_lock
    others: list[Path] = []

    def without_room(path: Path, *, shared: bool = False) -> int | None:
        if path != own:
            others.append(path)
            if len(others) == 2:
                raise no_room()
        return try_lock(path, shared=shared)

    with monkeypatch.context() as patch:
        patch.setattr(locks, "try_lock", without_room)
        report = await fake_host.fork("oak", names=["elm", "fir", "yew"], count=3)
    assert sorted(result.error_code or "" for result in report.results) == ["", "", NoSpace.code]
    await assert_tidy(fake_host, "oak", *(instance.name for instance in report.instances))


@pytest.mark.parametrize("operation", ["run", "restore", "standby"])
async def test_a_full_disk_is_said_to_be_one(fake_host: AsyncHost, driver: FakeDriver, operation: str) -> None:
    """Exit code 5 and what to do, not a traceback."""
    failing: Coroutine[Any, Any, object]
    match operation:
        case "run":
            driver.faults.fail_at("boot", error=no_room)
            failing = boot(fake_host)
        case "restore":
            await make(fake_host, State.STANDBY)
            driver.faults.fail_at("restore", error=no_room)
            failing = fake_host.restore("oak")
        case _:
            await boot(fake_host)
            driver.faults.fail_at("save_devices", error=no_room)
            failing = fake_host.standby("oak")
    with pytest.raises(NoSpace) as failure:
        await failing
    assert failure.value.hint
    await assert_tidy(fake_host, *([] if operation == "run" else ["oak"]))


def store_of_the_dead(host: AsyncHost) -> Store:
    """The database as a process that is dead now had it open."""
    process = subprocess.Popen(["sleep", "100"])
    store = Store(host.rooms.layout.database, (process.pid, start_ticks(process.pid) or 0))
    process.kill()
    process.wait()
    return store


async def test_a_lock_that_cannot_be_had_does_not_bar_the_data_directory(
    fake_host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may have left one in an ordinary user's data directory, or there is no room for a file: the others are served all the same."""
    oak = await make(fake_host, State.STOPPED)
    await make(fake_host, State.STOPPED, "elm")
    dead = store_of_the_dead(fake_host)
    dead.begin(oak, "start")
    dead.close()
    layout, try_lock = fake_host.rooms.layout, locks.try_lock
    unrecorded = layout.lock(make_instance().id)
    unrecorded.touch()

    def refused(path: Path, *, shared: bool = False) -> int | None:
        if path in (unrecorded, layout.lock(oak.id)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return try_lock(path, shared=shared)

    with monkeypatch.context() as patch:
        patch.setattr(locks, "try_lock", refused)
        async with make_host() as other:
            assert {instance.name for instance in await other.ls()} == {"oak", "elm"}
    async with make_host():
        pass
    await assert_tidy(fake_host, "oak", "elm")


async def test_a_process_that_is_not_shown_may_be_at_work(
    fake_host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc is mounted with hidepid=1, a pid of another user's cannot be looked at: what it may be doing is left to it, and nothing else fails."""
    oak = await make(fake_host, State.STOPPED)
    fake_host.rooms.store.begin(oak, "start")

    def hidden(pid: int) -> int | None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), f"/proc/{pid}/stat")

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "start_ticks", hidden)
        async with make_host() as other:
            assert [instance.name for instance in await other.ls()] == ["oak"]
    assert [entry.operation for entry in fake_host.rooms.store.journal()] == ["start"]


@pytest.mark.parametrize("gone", [files.MEMORY, files.VMSTATE, files.OVERLAY_DISK])
async def test_files_that_somebody_removed_do_not_bar_the_data_directory(
    fake_host: AsyncHost, make_host: HostFactory, gone: str
) -> None:
    """A committed capture that can never be finished: the others are served, this one is Stopped and can be removed."""
    oak = await make(fake_host, State.STANDBY)
    directory = fake_host.rooms.directory(oak.id)
    store = await asyncio.to_thread(store_of_the_dead, fake_host)
    store.begin(msgspec.structs.replace(oak, state=State.RUNNING), capture.COMMITTED)
    store.close()
    (directory / gone).unlink()
    async with make_host() as host:
        assert [found.state for found in await host.ls()] == [State.STOPPED]
        await host.rm("oak")
        await assert_tidy(host)


async def test_a_run_is_recorded_before_its_lock_is_made(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record first, act second: a host that dies between the two leaves no lock file that only `gc` finds."""
    create = fake_host.rooms.store.create

    def looked_at(instances: list[Instance], operation: str, check: Callable[[], None]) -> list[Instance]:
        assert list(fake_host.rooms.layout.locks.iterdir()) == []
        return create(instances, operation, check)

    monkeypatch.setattr(fake_host.rooms.store, "create", looked_at)
    await boot(fake_host, start=False)


async def test_a_host_that_cannot_be_opened_is_closed(
    fake_home: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`async with` does not close what it could not open: no database stays open."""

    async def fails(*_: object, **__: object) -> list[str]:
        raise no_room()

    monkeypatch.setattr(recovery, "recover", fails)
    host = AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)
    with pytest.raises(OSError, match="No space"):
        await host.open()
    with pytest.raises(RuntimeError, match="open the host first"):
        _ = host.rooms


# Memory and disk of one instant


@pytest.mark.parametrize("operation", ["restore", "fork", "fork to standby"])
async def test_memory_is_not_used_with_a_disk_that_has_moved_on(fake_host: AsyncHost, operation: str) -> None:
    """Somebody mounted it, or a VMM that nobody knows of ran on it: the guest would find another file system than it remembers."""
    oak = await make(fake_host, State.STANDBY)
    disk = fake_host.rooms.directory(oak.id) / files.OVERLAY_DISK
    with disk.open("r+b") as stream:
        stream.write(b"somebody was here")
    if operation == "restore":
        with pytest.raises(IntegrityError, match="not of one instant"):
            await fake_host.restore("oak")
    else:
        target = State.RUNNING if operation == "fork" else State.STANDBY
        (result,) = (await fake_host.fork("oak", target=target)).results
        assert result.error_code == IntegrityError.code
    await assert_tidy(fake_host, "oak")


async def test_a_fork_resolves_what_was_interrupted_on_its_source(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """Another host died while it restored the source, after this one was opened: its VMM is not left to write to the disk that is cloned."""
    oak = await make(fake_host, State.STANDBY)
    store = await asyncio.to_thread(store_of_the_dead, fake_host)
    store.begin(oak, "restore")
    store.close()
    launch = Launch(
        directory=fake_host.rooms.directory(oak.id),
        machine=oak.machine,
        mac="02:00:00:00:00:01",
        manifest=await driver.manifest(oak.machine),
    )
    started = await driver.restore(launch)
    report = await fake_host.fork("oak", names=["elm"])
    assert report.succeeded == 1
    assert not driver.alive(started)
    await assert_tidy(fake_host, "oak", "elm")


# All or nothing


async def test_an_undone_fan_out_is_undone_by_the_next_host_too(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host that undoes it may die as well: the journal names also the forks that were whole already."""
    await make(fake_host, State.TEMPLATE)
    journalled: set[str] = set()
    destroyed = destroy.destroy

    async def looked_at(rooms: Rooms, instance: Instance) -> None:
        entry = rooms.store.journal_entry(instance.id)
        if any(found.id == instance.id for found in rooms.store.instances()):
            journalled.add(entry.operation if entry else "nothing")
        await destroyed(rooms, instance)

    monkeypatch.setattr(destroy, "destroy", looked_at)
    gate = driver.faults.hold_at("restore", nth=2)
    driver.faults.fail_at("restore", nth=2)
    task = asyncio.create_task(fake_host.fork("oak", names=["elm", "fir"], count=2, atomic=True))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with asyncio.timeout(10):
        while not [vm for vm in await fake_host.ls() if vm.parent and vm.state is State.RUNNING]:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
    gate.release.set()
    with pytest.raises(VmmError):
        await task
    assert "nothing" not in journalled
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("operation", ["run", "fork"])
async def test_a_port_that_is_no_port_is_refused_before_anything_is_made(fake_host: AsyncHost, operation: str) -> None:
    """The library is a boundary as much as the command line is."""
    await make(fake_host, State.STANDBY)
    ports = [Publish(host_port=8080, guest_port=80, host_address="0.0.0.0,restrict=off")]
    with pytest.raises(UsageError):
        await (fake_host.fork("oak", publish=ports) if operation == "fork" else boot(fake_host, "elm", publish=ports))
    await assert_tidy(fake_host, "oak")


# A disk without room for the journal


@pytest.fixture
def full_journal(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, no operation can be begun."""

    def full(*_: object) -> None:
        raise NoSpace("no space for the database", hint="free some")

    return lambda: monkeypatch.setattr(fake_host.rooms.store, "begin", full)


async def test_a_stop_that_cannot_be_begun_is_none(fake_host: AsyncHost, full_journal: Callable[[], None]) -> None:
    """The guest is not switched off without having been asked to write out what it holds."""
    await boot(fake_host)
    full_journal()
    with pytest.raises(NoSpace):
        await fake_host.stop("oak")
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.RUNNING
    assert await ask(fake_host, "oak", "hostname") == "oak"


async def test_a_full_disk_does_not_keep_from_making_room(
    fake_host: AsyncHost, full_journal: Callable[[], None]
) -> None:
    """To remove what fills it is the cure that every error of a full disk names."""
    await boot(fake_host)
    full_journal()
    await fake_host.rm("oak")
    await assert_tidy(fake_host)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan"), 1e30])
async def test_a_time_limit_is_a_number_of_seconds(fake_host: AsyncHost, seconds: float) -> None:
    """What cannot be sent to the guest is refused here, with the exit code of a wrong request."""
    await boot(fake_host)
    with pytest.raises(UsageError):
        await fake_host.exec("oak", ["echo"], timeout_s=seconds)
    if seconds:
        with pytest.raises(UsageError):
            await fake_host.stop("oak", grace_s=seconds)
