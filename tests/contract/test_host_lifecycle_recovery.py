"""The next process finishes or undoes an interrupted operation, and sees VMMs that have ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import GuestTimeout
from coppice.machine import capture
from coppice.machine import directory as directories
from coppice.memory import memfile
from coppice.model import Instance, State, VmmProcess
from coppice.requests import (
    ExecRequest,
    GetRequest,
    InspectRequest,
    LsRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
    WaitRequest,
)
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm import driver as files
from coppice.vmm.driver import Saved
from coppice.vmm.process import start_ticks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make
from fakes.pids import ended
from fakes.records import make_instance


@pytest.fixture(scope="module")
def dead_process() -> tuple[int, int]:
    """Return the pid and start time of a process that has ended."""
    process = subprocess.Popen(["sleep", "100"])
    ticks = start_ticks(process.pid)
    process.kill()
    process.wait()
    assert ticks is not None
    return process.pid, ticks


@pytest.fixture
def dead_store(fake_host: AsyncHost, dead_process: tuple[int, int]) -> Iterator[Store]:
    """The database as opened by a process that has died, which interrupts its operations."""
    store = Store(fake_host.local.rooms.layout.database, dead_process)
    yield store
    store.close()


async def kill_vmm(instance: Instance) -> None:
    """Kill the VMM from outside, as the OOM killer does."""
    assert instance.vmm is not None
    os.kill(instance.vmm.pid, signal.SIGKILL)
    await ended(instance.vmm)


# A VMM that ended


@pytest.mark.parametrize("look", ["ls", "get", "inspect", "exec", "stats", "tree"])
async def test_every_operation_notices_a_killed_vmm(fake_host: AsyncHost, look: str) -> None:
    """The machine is Stopped with the reason, and its socket and live memory are removed."""
    vm = await boot(fake_host)
    await kill_vmm(vm)
    match look:
        case "ls":
            assert [found.state for found in await fake_host.call(LsRequest())] == [State.STOPPED]
        case "get":
            assert (await fake_host.call(GetRequest(instance=vm.id))).state is State.STOPPED
        case "inspect":
            assert (await fake_host.call(InspectRequest(instance=vm.id))).instance.state is State.STOPPED
        case "exec":
            with pytest.raises(Exception, match="oak is Stopped"):
                await fake_host.call(ExecRequest(instance=vm.id, argv=["echo"]))
        case "stats":
            assert await fake_host.stats() == {}
        case _:
            assert (await fake_host.tree())[0].instance.state is State.STOPPED
    (seen,) = await assert_tidy(fake_host, "oak")
    assert seen.exit_reason == "the VMM ended: signal 9"
    await fake_host.call(StartRequest(instance=vm.id))


async def test_a_restored_machine_that_was_killed_is_stopped(fake_host: AsyncHost) -> None:
    """A return to Standby would hide that its later work in memory is lost."""
    await make(fake_host, State.STANDBY)
    vm = await fake_host.call(RestoreRequest(instance="oak"))
    await ask(fake_host, vm, "save", "later")
    await kill_vmm(vm)
    assert (await fake_host.call(GetRequest(instance="oak"))).state is State.STOPPED
    await assert_tidy(fake_host, "oak")
    await fake_host.call(StartRequest(instance="oak"))
    assert await ask(fake_host, "oak", "load") == "later"


async def test_a_recycled_pid_is_not_taken_for_the_vmm(fake_host: AsyncHost) -> None:
    """After a reboot another process may have the pid; it is not killed."""
    vm = await boot(fake_host)
    await kill_vmm(vm)
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    ticks = start_ticks(stranger.pid)
    assert ticks is not None
    for process in (
        VmmProcess(pid=stranger.pid, start_ticks=ticks - 1, executable="/usr/bin/sleep"),
        VmmProcess(pid=stranger.pid, start_ticks=ticks, executable="/usr/bin/fake-vmm"),
    ):
        fake_host.local.rooms.store.save(msgspec.structs.replace(vm, vmm=process))
        async with asyncio.timeout(15):
            assert (await fake_host.call(GetRequest(instance=vm.id))).state is State.STOPPED
        assert start_ticks(stranger.pid) == ticks
    await fake_host.call(RmRequest(instance=vm.id))
    assert start_ticks(stranger.pid) == ticks
    stranger.kill()
    await stranger.wait()


async def test_waiting_for_the_end(fake_host: AsyncHost) -> None:
    """`wait` returns the instance when it has stopped, or raises at its deadline."""
    vm = await boot(fake_host)
    with pytest.raises(GuestTimeout):
        await fake_host.call(WaitRequest(instance=vm.id, deadline_s=0.01))
    waiting = asyncio.create_task(fake_host.call(WaitRequest(instance=vm.id, deadline_s=10)))
    await asyncio.sleep(0)
    await kill_vmm(vm)
    assert (await waiting).state is State.STOPPED
    assert (await fake_host.call(WaitRequest(instance=vm.id, deadline_s=0.01))).state is State.STOPPED


# An operation whose process died


@pytest.mark.parametrize("operation", [JournalOperation.RUN, JournalOperation.FORK, JournalOperation.REMOVE])
@pytest.mark.parametrize("state", [State.CREATED, State.INITIALIZING, State.RUNNING, State.STANDBY])
async def test_an_interrupted_creation_or_removal_is_finished_by_removing(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, operation: JournalOperation, state: State
) -> None:
    """A record, a directory or a running VMM: all of it is removed."""
    vm = await make(fake_host, state)
    dead_store.begin(vm, operation)
    async with make_host() as next_host:
        await assert_tidy(next_host)


async def test_a_record_without_a_directory_is_removed(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """Record first, act second: a process that died between the two leaves only a record."""
    dead_store.create([make_instance("a", State.CREATED), make_instance("b", State.CREATED)], JournalOperation.FORK)
    assert len(fake_host.local.rooms.store.instances()) == 2
    async with make_host() as next_host:
        await assert_tidy(next_host)


async def test_a_vmm_that_was_never_recorded_is_ended(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """If the host died before it recorded a VMM, only the working directory identifies it."""
    vm = await boot(fake_host)
    dead_store.begin(msgspec.structs.replace(vm, state=State.CREATED, vmm=None), JournalOperation.RUN)
    async with make_host() as next_host:
        await assert_tidy(next_host)
    assert vm.vmm is not None
    assert start_ticks(vm.vmm.pid) is None


async def test_an_interrupted_standby_is_undone(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store
) -> None:
    """Before the commit the guest runs on, and the files of the capture are removed."""
    vm = await boot(fake_host)
    directory = fake_host.local.rooms.directory(vm.id)
    dead_store.begin(vm, JournalOperation.STANDBY)
    await driver.pause(directory)
    await driver.save(directory)
    for name in (files.MEMORY_NEW, ".memory.new.0123456789ab.tmp"):
        (directory / name).write_bytes(b"half")
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        assert await ask(next_host, "oak", "hostname") == "oak"


@pytest.mark.parametrize(
    ("private", "layered"),
    [(False, False), (True, False), (True, True)],
    ids=["first boot", "private mapping", "layer"],
)
@pytest.mark.parametrize("came", ["committed", "ended", "vmstate renamed", "memory renamed"])
@pytest.mark.parametrize("finder", ["open", "ls", "restore"])
async def test_a_committed_standby_is_finished(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    dead_store: Store,
    private: bool,
    layered: bool,
    came: str,
    finder: str,
) -> None:
    """Nothing is lost after the commit, and the first operation finishes the standby."""
    vm = await boot(fake_host)
    if private:
        await fake_host.call(StandbyRequest(instance="oak"))
        vm = await fake_host.call(RestoreRequest(instance="oak"))
    await ask(fake_host, "oak", "remember", "key", "value")
    directory = fake_host.local.rooms.directory(vm.id)
    assert vm.vmm is not None
    await driver.pause(directory)
    saved = await driver.save(directory)
    fresh = directory / (files.LIVE_MEMORY if saved is Saved.IN_FILE else files.MEMORY_NEW)
    if private:
        able = msgspec.structs.replace(driver.capabilities, maps_layers=layered)
        with capture.private_capture(vm, able, directory, directory / files.MEMORY_NEW) as collecting:
            collecting.prepare()
            collecting.collect(vm.vmm.pid)
            mem_file, layers, _ = collecting.finish()
        assert len(layers) == layered
        taken = capture.new_capture(vm, mem_file, layers)
    else:
        taken = capture.new_capture(vm, memfile.describe(fresh))
    dead_store.begin(msgspec.structs.replace(vm, capture=taken), JournalOperation.STANDBY_COMMIT)
    if came != "committed":
        await driver.quit(directory, vm.vmm)
    if came in ("vmstate renamed", "memory renamed"):
        (directory / files.VMSTATE_NEW).rename(directory / files.VMSTATE)
    if came == "memory renamed":
        fresh.chmod(0o444)
        fresh.rename(directories.memory_paths(directory, taken)[-1])
    if finder == "open":
        async with make_host() as next_host:
            await assert_tidy(next_host, "oak")
    elif finder == "ls" and came != "committed":
        assert [found.state for found in await fake_host.call(LsRequest())] == [State.STANDBY]
        await assert_tidy(fake_host, "oak")
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await ask(fake_host, "oak", "recall", "key") == "value"
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize(
    ("operation", "state", "settled"),
    [
        (JournalOperation.START, State.STOPPED, State.STOPPED),
        (JournalOperation.START, State.INITIALIZING, State.STOPPED),
        (JournalOperation.STOP, State.SHUTDOWN, State.STOPPED),
        (JournalOperation.RESTORE, State.STANDBY, State.STANDBY),
    ],
)
async def test_an_interrupted_change_of_state_is_brought_to_rest(
    fake_host: AsyncHost,
    make_host: HostFactory,
    dead_store: Store,
    operation: JournalOperation,
    state: State,
    settled: State,
) -> None:
    """Its VMM is ended, and the record names the interrupted operation."""
    vm = await make(fake_host, state)
    dead_store.begin(vm, operation)
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
    assert (found.state, found.exit_reason) == (settled, f"{operation} was interrupted")


async def test_an_interrupted_restore_keeps_the_capture(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """The host is killed before the guest answers; the machine is back in Standby."""
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    await fake_host.call(StandbyRequest(instance="oak"))
    vm = await fake_host.call(RestoreRequest(instance="oak"))
    dead_store.begin(msgspec.structs.replace(vm, state=State.INITIALIZING), JournalOperation.RESTORE)
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
        assert found.state is State.STANDBY
        await next_host.call(RestoreRequest(instance="oak"))
        assert await ask(next_host, "oak", "recall", "key") == "value"


async def test_an_operation_under_way_is_left_alone(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """Another host that opens the data directory does not resolve a living process's work."""
    gate = driver.faults.hold_at("identity")
    running = asyncio.create_task(boot(fake_host))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with make_host() as other:
        assert [vm.state for vm in await other.ls()] == [State.INITIALIZING]
        await other.gc()
    gate.release.set()
    assert (await running).state is State.RUNNING
    await assert_tidy(fake_host, "oak")


async def test_recovery_does_not_act_on_a_stale_journal(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host may resolve the row between the read of the journal and the lock."""
    vm = await boot(fake_host)
    dead_store.begin(vm, JournalOperation.REMOVE)
    stale = dead_store.journal()
    fake_host.local.rooms.store.save(vm, done=True)
    current = Store.journal
    answers = [stale]
    monkeypatch.setattr(Store, "journal", lambda store: answers.pop() if answers else current(store))
    async with make_host():
        assert not answers
    assert await ask(fake_host, "oak", "hostname") == "oak"
    await assert_tidy(fake_host, "oak")


async def test_recovery_goes_on_after_a_failure(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    dead_store: Store,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An instance that cannot be resolved is logged and tried again the next time."""
    stubborn, other = await boot(fake_host, "stubborn"), await boot(fake_host, "other")
    for vm in (stubborn, other):
        dead_store.begin(vm, JournalOperation.REMOVE)
    driver.faults.fail_at("quit")
    async with make_host() as next_host:
        assert [vm.name for vm in next_host.local.rooms.store.instances()] == ["stubborn"]
    assert any("cannot be resolved yet" in record.getMessage() for record in caplog.records)
    async with make_host() as next_host:
        await assert_tidy(next_host)


# A host process that is killed

HOST_PROCESS = """
import asyncio, sys
from pathlib import Path
from coppice.client import AsyncHost
from coppice.model import State
from fakes.driver import FakeDriver
from fakes.hosting import boot
from fakes.rooms import DEADLINES, open_rooms

async def main(program, home):
    driver = FakeDriver(Path(program))
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        print("begin", flush=True)
        while True:
            oak = host.machine(await boot(host))
            await oak.standby()
            elms = await oak.fork(2, names=["elm"])
            await elms[0].standby()
            await elms[0].restore()
            await elms[1].stop()
            await oak.promote()
            for machine in (*elms, oak):
                await machine.rm()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("after_ms", [0, 7, 13, 20, 29, 41, 60, 90])
async def test_a_host_that_is_killed_at_any_instant_leaves_nothing_behind(
    fake_vmm: Path, fake_home: Path, make_host: HostFactory, after_ms: int
) -> None:
    """The next host finds only whole instances, and can use and remove them."""
    paths = os.pathsep.join(path for path in sys.path if path)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST_PROCESS, str(fake_vmm), str(fake_home)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"begin\n"
    await asyncio.sleep(after_ms / 1000)
    process.kill()
    await process.wait()
    async with make_host() as host:
        instances = await host.call(LsRequest())
        await assert_tidy(host, *(vm.name for vm in instances))
        for vm in reversed(instances):
            if vm.state is State.STANDBY:
                await host.call(RestoreRequest(instance=vm.id))
                assert await ask(host, vm, "hostname") == vm.name
            await host.call(RmRequest(instance=vm.id))
        await assert_tidy(host)
