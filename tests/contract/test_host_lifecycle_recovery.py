"""What was interrupted is finished or undone by whoever comes next; what ended by itself is seen; what nothing owns is collected."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.fork import fanout
from coppice.fork.plan import make_request
from coppice.host import AsyncHost
from coppice.instance import capture, destroy
from coppice.memory.capture import PrivateCapture
from coppice.model import Instance, MemFile, State, VmmProcess, no_progress
from coppice.store.store import Store
from coppice.vmm import driver as files
from coppice.vmm.process import start_ticks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make
from fakes.pids import ended
from fakes.records import make_instance


@pytest.fixture(scope="module")
def dead_process() -> tuple[int, int]:
    """Pid and start time of a process that is gone."""
    process = subprocess.Popen(["sleep", "100"])
    ticks = start_ticks(process.pid)
    process.kill()
    process.wait()
    assert ticks is not None
    return process.pid, ticks


@pytest.fixture
def dead_store(fake_host: AsyncHost, dead_process: tuple[int, int]) -> Iterator[Store]:
    """The database as a process that is dead now had it open: what it begins was interrupted."""
    store = Store(fake_host.rooms.layout.database, dead_process)
    yield store
    store.close()


async def kill_vmm(instance: Instance) -> None:
    """The VMM is killed from outside, as by the OOM killer."""
    assert instance.vmm is not None
    os.kill(instance.vmm.pid, signal.SIGKILL)
    await ended(instance.vmm)


# A VMM that ended


@pytest.mark.parametrize("look", ["ls", "get", "inspect", "exec", "stats", "tree"])
async def test_a_vmm_that_was_killed_is_seen_by_whoever_looks(fake_host: AsyncHost, look: str) -> None:
    """Stopped with the reason, and at rest: no socket, no live memory, whatever asked first."""
    vm = await boot(fake_host)
    await kill_vmm(vm)
    match look:
        case "ls":
            assert [found.state for found in await fake_host.ls()] == [State.STOPPED]
        case "get":
            assert (await fake_host.get(vm)).state is State.STOPPED
        case "inspect":
            assert (await fake_host.inspect(vm)).instance.state is State.STOPPED
        case "exec":
            with pytest.raises(Exception, match="oak is Stopped"):
                await fake_host.exec(vm, ["echo"])
        case "stats":
            assert await fake_host.stats() == {}
        case _:
            assert (await fake_host.tree())[0].instance.state is State.STOPPED
    (seen,) = await assert_tidy(fake_host, "oak")
    assert seen.exit_reason == "the VMM ended: signal 9"
    await fake_host.start(vm)


async def test_a_restored_machine_that_was_killed_is_not_silently_back_at_its_capture(fake_host: AsyncHost) -> None:
    """What it had done since is lost, and that shows: it is Stopped, with its disk as it was left."""
    await make(fake_host, State.STANDBY)
    vm = await fake_host.restore("oak")
    await ask(fake_host, vm, "save", "later")
    await kill_vmm(vm)
    assert (await fake_host.get("oak")).state is State.STOPPED
    await assert_tidy(fake_host, "oak")
    await fake_host.start("oak")
    assert await ask(fake_host, "oak", "load") == "later"


async def test_a_recycled_pid_is_not_taken_for_the_vmm(fake_host: AsyncHost) -> None:
    """After a reboot the pid is somebody else's: it is neither believed to be the VMM nor killed."""
    vm = await boot(fake_host)
    await kill_vmm(vm)
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    ticks = start_ticks(stranger.pid)
    assert ticks is not None
    for process in (
        VmmProcess(pid=stranger.pid, start_ticks=ticks - 1, executable="/usr/bin/sleep"),
        VmmProcess(pid=stranger.pid, start_ticks=ticks, executable="/usr/bin/fake-vmm"),
    ):
        fake_host.rooms.store.save(msgspec.structs.replace(vm, vmm=process))
        async with asyncio.timeout(15):
            assert (await fake_host.get(vm)).state is State.STOPPED
        assert start_ticks(stranger.pid) == ticks
    await fake_host.rm(vm)
    assert start_ticks(stranger.pid) == ticks
    stranger.kill()
    await stranger.wait()


async def test_waiting_for_the_end(fake_host: AsyncHost) -> None:
    """`wait` returns the instance at rest, or raises while it runs on."""
    vm = await boot(fake_host)
    with pytest.raises(TimeoutError):
        await fake_host.wait(vm, deadline_s=0.01)
    waiting = asyncio.create_task(fake_host.wait(vm, deadline_s=10))
    await asyncio.sleep(0)
    await kill_vmm(vm)
    assert (await waiting).state is State.STOPPED
    assert (await fake_host.wait(vm, deadline_s=0.01)).state is State.STOPPED


# An operation whose process died


@pytest.mark.parametrize("operation", ["run", "fork", "rm"])
@pytest.mark.parametrize("state", [State.CREATED, State.INITIALIZING, State.RUNNING, State.STANDBY])
async def test_what_was_being_made_or_removed_is_removed(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, operation: str, state: State
) -> None:
    """However far it came: a record alone, a directory, a VMM that runs."""
    vm = await make(fake_host, state)
    dead_store.begin(vm, operation)
    async with make_host() as next_host:
        await assert_tidy(next_host)


async def test_a_record_without_a_directory_is_removed(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """Record first, act second: a process that died between the two leaves only this."""
    dead_store.create([make_instance("a", State.CREATED), make_instance("b", State.CREATED)], "fork")
    assert len(fake_host.rooms.store.instances()) == 2
    async with make_host() as next_host:
        await assert_tidy(next_host)


@pytest.mark.parametrize("target", [State.RUNNING, State.STANDBY])
@pytest.mark.parametrize("atomic", [True, False])
async def test_all_or_none_holds_for_a_killed_host_too(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    dead_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    atomic: bool,
    target: State,
) -> None:
    """A host dies when one child is whole and its sibling is not: with `atomic` neither is left, else the whole one stays."""
    oak = await make(fake_host, State.TEMPLATE)
    rooms = dataclasses.replace(fake_host.rooms, store=dead_store)
    request = make_request(
        count=2, names=["elm", "fir"], target=target, atomic=atomic, tags={}, publish=(), from_running=False
    )

    class Killed(BaseException):
        """What a SIGKILL is to the code that it ends: nothing after it runs."""

    save, whole = Store.save, list[str]()

    def killed_before_the_second(store: Store, instance: Instance, *, done: bool = False) -> None:
        if instance.state is target:
            whole.append(instance.id)
            if whole[0] != instance.id:
                raise Killed
        save(store, instance, done=done)

    async def never(*_: object) -> None:
        """A dead process cleans nothing up."""

    monkeypatch.setattr(Store, "save", killed_before_the_second)
    monkeypatch.setattr(fanout, "_abandon", never)
    monkeypatch.setattr(destroy, "destroy", never)
    monkeypatch.setattr(driver, "quit", never)
    with pytest.raises(Killed):
        await fanout.fan_out(rooms, oak, request, no_progress, owner=None, admit=lambda: None)
    monkeypatch.undo()
    async with make_host() as host:
        left = {vm.name for vm in await host.ls()} - {"oak"}
        assert len(left) == (0 if atomic else 1)
        assert left <= {"elm", "fir"}
        await assert_tidy(host, "oak", *left)


async def test_a_vmm_that_was_never_recorded_is_ended(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """A host that was killed between starting a VMM and recording it leaves one that only its working directory names."""
    vm = await boot(fake_host)
    dead_store.begin(msgspec.structs.replace(vm, state=State.CREATED, vmm=None), "run")
    async with make_host() as next_host:
        await assert_tidy(next_host)
    assert vm.vmm is not None
    assert start_ticks(vm.vmm.pid) is None


async def test_an_interrupted_standby_is_undone(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store
) -> None:
    """Before the commit the guest runs on; what the capture had written by then is gone."""
    vm = await boot(fake_host)
    directory = fake_host.rooms.directory(vm.id)
    dead_store.begin(vm, capture.OPERATION)
    await driver.pause(directory)
    await driver.save_devices(directory)
    for name in ("memory.new", ".memory.new.0123456789ab.tmp"):
        (directory / name).write_bytes(b"half")
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        assert await ask(next_host, "oak", "hostname") == "oak"


@pytest.mark.parametrize("private", [False, True], ids=["first boot", "private mapping"])
@pytest.mark.parametrize("came", ["committed", "ended", "vmstate renamed", "memory renamed"])
@pytest.mark.parametrize("finder", ["open", "ls", "restore"])
async def test_a_committed_standby_is_finished(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    dead_store: Store,
    private: bool,
    came: str,
    finder: str,
) -> None:
    """After the commit nothing is lost, at whatever step it stopped, and whoever comes by first finishes it."""
    vm = await boot(fake_host)
    if private:
        await fake_host.standby("oak")
        vm = await fake_host.restore("oak")
    await ask(fake_host, "oak", "remember", "key", "value")
    directory = fake_host.rooms.directory(vm.id)
    assert vm.vmm is not None
    await driver.pause(directory)
    await driver.save_devices(directory)
    if private:
        assert vm.mem_file is not None
        _collect(directory, vm.mem_file, vm.vmm.pid)
    dead_store.begin(vm, capture.COMMITTED)
    if came != "committed":
        await driver.quit(directory, vm.vmm)
    if came in ("vmstate renamed", "memory renamed"):
        (directory / files.VMSTATE_NEW).rename(directory / files.VMSTATE)
    if came == "memory renamed":
        fresh = directory / ("memory.new" if private else files.LIVE_MEMORY)
        fresh.chmod(0o444)
        fresh.rename(directory / files.MEMORY)
    if finder == "open":
        async with make_host() as next_host:
            await assert_tidy(next_host, "oak")
    elif finder == "ls" and came != "committed":
        assert [found.state for found in await fake_host.ls()] == [State.STANDBY]
        await assert_tidy(fake_host, "oak")
    await fake_host.restore("oak")
    assert await ask(fake_host, "oak", "recall", "key") == "value"
    await assert_tidy(fake_host, "oak")


def _collect(directory: Path, base: MemFile, pid: int) -> None:
    with PrivateCapture(directory / files.MEMORY, base, directory / capture.NEW_MEMORY) as collecting:
        collecting.prepare()
        collecting.collect(pid)
        collecting.finish()


@pytest.mark.parametrize(
    ("operation", "state", "settled"),
    [
        ("start", State.STOPPED, State.STOPPED),
        ("start", State.INITIALIZING, State.STOPPED),
        ("stop", State.SHUTDOWN, State.STOPPED),
        ("restore", State.STANDBY, State.STANDBY),
        ("something new", State.RUNNING, State.STOPPED),
    ],
)
async def test_an_interrupted_change_of_state_is_brought_to_rest(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, operation: str, state: State, settled: State
) -> None:
    """No VMM of it is left, and the record says what interrupted it."""
    vm = await make(fake_host, state)
    dead_store.begin(vm, operation)
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
    assert (found.state, found.exit_reason) == (settled, f"{operation} was interrupted")


async def test_an_interrupted_restore_keeps_the_capture(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """The VMM runs, the guest has not answered, the host is killed: back to Standby, with all that was captured."""
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    await fake_host.standby("oak")
    vm = await fake_host.restore("oak")
    dead_store.begin(msgspec.structs.replace(vm, state=State.INITIALIZING), "restore")
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
        assert found.state is State.STANDBY
        await next_host.restore("oak")
        assert await ask(next_host, "oak", "recall", "key") == "value"


async def test_what_is_under_way_is_left_alone(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """Another host that opens the data directory meanwhile does not take a living process for a dead one."""
    gate = driver.faults.hold_at("identity")
    running = asyncio.create_task(boot(fake_host))
    await asyncio.wait_for(gate.reached.wait(), 10)
    async with make_host() as other:
        assert [vm.state for vm in await other.ls()] == [State.INITIALIZING]
        await other.gc()
    gate.release.set()
    assert (await running).state is State.RUNNING
    await assert_tidy(fake_host, "oak")


async def test_recovery_does_not_act_on_what_it_read_before(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading the journal and taking the lock, another host may have resolved the row, and the instance moved on."""
    vm = await boot(fake_host)
    dead_store.begin(vm, "rm")
    stale = dead_store.journal()
    fake_host.rooms.store.save(vm, done=True)
    current = Store.journal
    answers = [stale]
    monkeypatch.setattr(Store, "journal", lambda store: answers.pop() if answers else current(store))
    async with make_host():
        assert not answers
    assert await ask(fake_host, "oak", "hostname") == "oak"
    await assert_tidy(fake_host, "oak")


async def test_recovery_goes_on_when_one_cannot_be_resolved(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    dead_store: Store,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One instance that resists does not keep the data directory closed: it is logged, and tried again the next time."""
    stubborn, other = await boot(fake_host, "stubborn"), await boot(fake_host, "other")
    for vm in (stubborn, other):
        dead_store.begin(vm, "rm")
    driver.faults.fail_at("quit")
    async with make_host() as next_host:
        assert [vm.name for vm in next_host.rooms.store.instances()] == ["stubborn"]
    assert any("cannot be resolved yet" in record.getMessage() for record in caplog.records)
    async with make_host() as next_host:
        await assert_tidy(next_host)


# A host process that is killed

HOST_PROCESS = """
import asyncio, sys
from pathlib import Path
from coppice.host import AsyncHost
from coppice.model import State
from fakes.driver import FakeDriver
from fakes.hosting import boot
from fakes.rooms import DEADLINES, open_rooms

async def main(program, home):
    driver = FakeDriver(Path(program))
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        print("begin", flush=True)
        while True:
            await boot(host)
            await host.standby("oak")
            await host.fork("oak", names=["elm"], count=2)
            await host.standby("elm-1")
            await host.restore("elm-1")
            await host.stop("elm-2")
            await host.promote("oak")
            for name in ("elm-1", "elm-2", "oak"):
                await host.rm(name)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("after_ms", [0, 7, 13, 20, 29, 41, 60, 90])
async def test_a_host_that_is_killed_at_any_instant_leaves_nothing_behind(
    fake_vmm: Path, fake_home: Path, make_host: HostFactory, after_ms: int
) -> None:
    """SIGKILL after so many milliseconds of work: the next host finds whole instances only, and can use and remove them."""
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
        instances = await host.ls()
        await assert_tidy(host, *(vm.name for vm in instances))
        for vm in reversed(instances):
            if vm.state is State.STANDBY:
                await host.restore(vm)
                assert await ask(host, vm, "hostname") == vm.name
            await host.rm(vm)
        await assert_tidy(host)
