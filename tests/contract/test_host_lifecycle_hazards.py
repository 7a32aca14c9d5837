"""Hazards between two steps: a cancelled commit, an OS error, a missing file, a hostile guest."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import subprocess
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import IntegrityError, NoSpace, UsageError, VmmError, VmmTimeout
from coppice.host import recovery
from coppice.machine import destroy
from coppice.machine import directory as directories
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Publish, State
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    LsRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StopRequest,
)
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch
from coppice.vmm.process import start_ticks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make
from fakes.records import make_instance
from fakes.rooms import DEADLINES, open_rooms

# Captures


async def test_a_cancelled_commit_counts(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the commit the guest must not run: its disk would no longer match the capture."""
    await boot(fake_host)
    store, loop = fake_host.local.rooms.store, asyncio.get_running_loop()
    begin = store.begin

    def cancelled_commit(instance: Instance, operation: JournalOperation) -> None:
        begin(instance, operation)
        if operation == JournalOperation.STANDBY_COMMIT:
            loop.call_soon_threadsafe(task.cancel)

    monkeypatch.setattr(store, "begin", cancelled_commit)
    task = asyncio.create_task(fake_host.call(StandbyRequest(instance="oak")))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert driver.faults.reached["resume"] == 0
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY


async def test_the_disk_of_a_capture_survives_a_power_cut(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is synced too; memory restored on an older disk would corrupt its file system."""
    oak = await boot(fake_host)
    synced: set[int] = set()
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    await fake_host.call(StandbyRequest(instance="oak"))
    directory = fake_host.local.rooms.directory(oak.id)
    for name in (files.MEMORY, files.VMSTATE, files.OVERLAY_DISK):
        assert (directory / name).stat().st_ino in synced


@pytest.mark.parametrize("source", [State.TEMPLATE, State.RUNNING])
async def test_a_captured_fork_survives_a_power_cut(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, source: State
) -> None:
    """The record may become durable at any moment, so memory and disk are synced before it: a link to
    captured memory by its capture.
    """
    store, save_all, fsync = fake_host.local.rooms.store, fake_host.local.rooms.store.save_all, os.fsync
    synced: set[int] = set()
    synced_before: dict[str, set[int]] = {}

    def recorded(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def saved(instances: Sequence[Instance], *, done: bool = False) -> set[str]:
        synced_before.update({instance.name: set(synced) for instance in instances})
        return save_all(instances, done=done)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(store, "save_all", saved)
    await make(fake_host, source)
    running = source is State.RUNNING
    report = await fake_host.call(
        ForkRequest(instance="oak", names=["elm"], target=State.STANDBY, from_running=running)
    )
    (elm,) = report.instances
    directory = fake_host.local.rooms.directory(elm.id)
    for path in (directory, *(directory / name for name in (files.MEMORY, files.VMSTATE, files.OVERLAY_DISK))):
        assert path.stat().st_ino in synced_before["elm"], path


async def test_a_guest_that_cannot_be_resumed_is_paused(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Its state is Paused, not Running; a standby and a restore let it run on."""
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    driver.faults.fail_at("save")
    driver.faults.fail_at("resume", error=lambda: VmmTimeout("it does not answer", hint="wait"))
    with pytest.raises(Exception, match="save is planned to fail"):
        await fake_host.call(StandbyRequest(instance="oak"))
    assert (await fake_host.call(GetRequest(instance="oak"))).state is State.PAUSED
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await ask(fake_host, "oak", "recall", "key") == "value"


async def test_a_stuck_command_does_not_block_a_restore(fake_host: AsyncHost) -> None:
    """A command that stops reading its port holds the port's lock long after the VMM is gone."""
    oak = await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    await fake_host.local.rooms.ports(oak).close_idle()  # this process holds the port a little longer
    port = os.open(fake_host.local.rooms.directory(oak.id) / "port1.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(port, fcntl.LOCK_EX)
        standby = (await fake_host.call(StandbyRequest(instance="oak"))).instance
        assert standby.capture
        assert standby.capture.open_ports == (1,)
        async with asyncio.timeout(DEADLINES.ready / 2):
            await fake_host.call(RestoreRequest(instance="oak"))
    finally:
        os.close(port)
    assert await ask(fake_host, "oak", "recall", "key") == "value"


# Errors of the operating system


def no_room() -> OSError:
    """Return the error of a full disk before any layer translates it."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_fork_that_fails_on_a_full_disk_spares_its_siblings(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A log, socket or lock without space is one child's failure, with an error that says so."""
    await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at("restore", nth=2, error=no_room)
    report = await fake_host.call(ForkRequest(instance="oak", names=["elm", "fir", "yew"], count=3))
    assert sorted(result.error_code or "" for result in report.results) == ["", "", NoSpace.code]
    await assert_tidy(fake_host, "oak", *(instance.name for instance in report.instances))


async def test_a_fork_without_room_for_its_lock_leaves_nothing(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork was recorded first; its name and its budget are free again at once."""
    oak = await make(fake_host, State.TEMPLATE)
    own, take = fake_host.local.rooms.layout.lock(oak.id), locks._Place.take
    others: list[Path] = []

    def without_room(place: locks._Place, *, queue: bool) -> int | None:
        if place._path != own:
            others.append(place._path)
            if len(others) == 2:
                raise no_room()
        return take(place, queue=queue)

    with monkeypatch.context() as patch:
        patch.setattr(locks._Place, "take", without_room)
        report = await fake_host.call(ForkRequest(instance="oak", names=["elm", "fir", "yew"], count=3))
    assert sorted(result.error_code or "" for result in report.results) == ["", "", NoSpace.code]
    await assert_tidy(fake_host, "oak", *(instance.name for instance in report.instances))


@pytest.mark.parametrize("operation", ["run", "restore", "standby"])
async def test_a_full_disk_is_reported_as_such(
    fake_host: AsyncHost, driver: FakeDriver, operation: JournalOperation
) -> None:
    """The error has exit code 5 and a hint, instead of a traceback."""
    failing: Coroutine[Any, Any, object]
    match operation:
        case "run":
            driver.faults.fail_at("boot", error=no_room)
            failing = boot(fake_host)
        case "restore":
            await make(fake_host, State.STANDBY)
            driver.faults.fail_at("restore", error=no_room)
            failing = fake_host.call(RestoreRequest(instance="oak"))
        case _:
            await boot(fake_host)
            driver.faults.fail_at("save", error=no_room)
            failing = fake_host.call(StandbyRequest(instance="oak"))
    with pytest.raises(NoSpace) as failure:
        await failing
    assert failure.value.hint
    await assert_tidy(fake_host, *([] if operation == "run" else ["oak"]))


def store_of_the_dead(host: AsyncHost) -> Store:
    """Return the database as opened by a process that has since died."""
    process = subprocess.Popen(["sleep", "100"])
    store = Store(host.local.rooms.layout.database, (process.pid, start_ticks(process.pid) or 0))
    process.kill()
    process.wait()
    return store


async def test_an_unusable_lock_does_not_block_the_data_directory(
    fake_host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock may belong to root or lack space; the other instances work all the same."""
    oak = await make(fake_host, State.STOPPED)
    await make(fake_host, State.STOPPED, "elm")
    dead = store_of_the_dead(fake_host)
    dead.begin(oak, JournalOperation.START)
    dead.close()
    layout, try_lock = fake_host.local.rooms.layout, locks.try_lock
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


async def test_a_hidden_process_may_be_at_work(
    fake_host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hidepid=1 other users' processes are hidden; their operations are left alone."""
    oak = await make(fake_host, State.STOPPED)
    fake_host.local.rooms.store.begin(oak, JournalOperation.START)

    def hidden(pid: int) -> int | None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), f"/proc/{pid}/stat")

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "start_ticks", hidden)
        async with make_host() as other:
            assert [instance.name for instance in await other.ls()] == ["oak"]
    assert [entry.operation for entry in fake_host.local.rooms.store.journal()] == ["start"]


@pytest.mark.parametrize("gone", [files.MEMORY, files.VMSTATE, files.OVERLAY_DISK])
async def test_missing_files_do_not_block_the_data_directory(
    fake_host: AsyncHost, make_host: HostFactory, gone: str
) -> None:
    """An instance whose committed capture has lost files is Stopped and can be removed."""
    oak = await make(fake_host, State.STANDBY)
    directory = fake_host.local.rooms.directory(oak.id)
    store = await asyncio.to_thread(store_of_the_dead, fake_host)
    store.begin(msgspec.structs.replace(oak, state=State.RUNNING), JournalOperation.STANDBY_COMMIT)
    store.close()
    (directory / gone).unlink()
    async with make_host() as host:
        assert [found.state for found in await host.call(LsRequest())] == [State.STOPPED]
        await host.call(RmRequest(instance="oak"))
        await assert_tidy(host)


async def test_a_run_is_recorded_before_its_lock_is_made(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that dies between the two leaves no lock file that only `gc` finds."""
    create = fake_host.local.rooms.store.create

    def looked_at(instances: list[Instance], operation: JournalOperation, check: Callable[[], None]) -> list[Instance]:
        assert list(fake_host.local.rooms.layout.locks.iterdir()) == []
        return create(instances, operation, check)

    monkeypatch.setattr(fake_host.local.rooms.store, "create", looked_at)
    await boot(fake_host, start=False)


async def test_a_host_that_cannot_be_opened_is_closed(
    fake_home: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`async with` does not close a host that failed to open: `open` closes the database."""

    def fails(_: object) -> bool:
        raise no_room()

    monkeypatch.setattr(recovery, "is_needed", fails)
    host = AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)
    with pytest.raises(OSError, match="No space"):
        await host.open()
    with pytest.raises(UsageError, match="not open"):
        _ = host.local.rooms


# Memory and disk of one instant


@pytest.mark.parametrize("operation", ["restore", "fork", "fork to standby"])
async def test_memory_is_not_used_with_a_changed_disk(fake_host: AsyncHost, operation: JournalOperation) -> None:
    """A guest restored on a changed disk would find another file system than it remembers."""
    oak = await make(fake_host, State.STANDBY)
    disk = fake_host.local.rooms.directory(oak.id) / files.OVERLAY_DISK
    with disk.open("r+b") as stream:
        stream.write(b"changed")
    if operation == "restore":
        with pytest.raises(IntegrityError, match="do not belong together"):
            await fake_host.call(RestoreRequest(instance="oak"))
    else:
        target = State.RUNNING if operation == "fork" else State.STANDBY
        (result,) = (await fake_host.call(ForkRequest(instance="oak", target=target))).results
        assert result.error_code == IntegrityError.code
    await assert_tidy(fake_host, "oak")


async def test_a_fork_resolves_an_interrupted_restore_of_its_source(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """The VMM of a restore whose host died is ended before the disk is cloned."""
    oak = await make(fake_host, State.STANDBY)
    store = await asyncio.to_thread(store_of_the_dead, fake_host)
    store.begin(oak, JournalOperation.RESTORE)
    store.close()
    launch = Launch(
        directory=fake_host.local.rooms.directory(oak.id),
        machine=oak.machine,
        disks=directories.devices(oak.machine),
        nics=await fake_host.local.rooms.networks.attach(oak, driver.capabilities.nic_backends),
        manifest=await driver.manifest(oak.machine),
    )
    started = await driver.restore(launch)
    report = await fake_host.call(ForkRequest(instance="oak", names=["elm"]))
    assert report.succeeded == 1
    assert not driver.alive(started)
    await assert_tidy(fake_host, "oak", "elm")


# All or nothing


async def test_the_next_host_can_undo_a_fan_out_too(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undoing host may die as well, so the journal also names the complete forks."""
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
    task = asyncio.create_task(fake_host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2, atomic=True)))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with asyncio.timeout(10):
        while not [vm for vm in await fake_host.call(LsRequest()) if vm.parent and vm.state is State.RUNNING]:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0.01)
    gate.release.set()
    with pytest.raises(VmmError):
        await task
    assert "nothing" not in journalled
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("operation", ["run", "fork"])
async def test_an_invalid_published_port_is_refused_first(fake_host: AsyncHost, operation: JournalOperation) -> None:
    """The library validates ports as the command line does, before it makes anything."""
    await make(fake_host, State.STANDBY)
    ports = [Publish(host_port=8080, guest_port=80, host_address="0.0.0.0,restrict=off")]
    with pytest.raises(UsageError):
        await (
            fake_host.call(ForkRequest(instance="oak", publish=ports))
            if operation == "fork"
            else boot(fake_host, "elm", publish=ports)
        )
    await assert_tidy(fake_host, "oak")


# A disk without room for the journal


@pytest.fixture
def full_journal(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes each later begin of an operation fail for lack of space."""

    def full(*_: object) -> None:
        raise NoSpace("no space for the database", hint="free some")

    return lambda: monkeypatch.setattr(fake_host.local.rooms.store, "begin", full)


async def test_a_stop_that_cannot_begin_changes_nothing(fake_host: AsyncHost, full_journal: Callable[[], None]) -> None:
    """The guest is not switched off without the chance to write out its data."""
    await boot(fake_host)
    full_journal()
    with pytest.raises(NoSpace):
        await fake_host.call(StopRequest(instance="oak"))
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.RUNNING
    assert await ask(fake_host, "oak", "hostname") == "oak"


async def test_a_full_disk_allows_removals(fake_host: AsyncHost, full_journal: Callable[[], None]) -> None:
    """Removing an instance is the cure that every error of a full disk names."""
    await boot(fake_host)
    full_journal()
    await fake_host.call(RmRequest(instance="oak"))
    await assert_tidy(fake_host)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan"), 1e30])
async def test_an_invalid_time_limit_is_refused(fake_host: AsyncHost, seconds: float) -> None:
    """A limit that cannot be sent to the guest is a UsageError."""
    await boot(fake_host)
    with pytest.raises(UsageError):
        await fake_host.call(ExecRequest(instance="oak", argv=["echo"], timeout_s=seconds))
    if seconds:
        with pytest.raises(UsageError):
            await fake_host.call(StopRequest(instance="oak", grace_s=seconds))
