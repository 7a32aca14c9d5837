"""Remains of a killed process: a held lock, a launcher, a frozen disk, a half-true record, half of a fan-out."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import Busy, HostCannot, NotFound
from coppice.fork import fanout
from coppice.host import recovery, settling
from coppice.machine import capture, destroy
from coppice.machine import directory as directories
from coppice.model import Instance, State, VmmProcess, no_progress
from coppice.names import new_id
from coppice.requests import ForkRequest, GetRequest, HealthRequest, InspectRequest, LsRequest
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.vmm.launcher import PROGRAM as LAUNCHER
from coppice.vmm.process import kill, start_ticks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, snapshot


async def test_a_lock_that_outlives_its_process_for_a_moment(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """A child between fork and exec holds the locks of the killed host.

    Recovery waits for it, and leaves no row behind.
    """
    vm = await boot(fake_host)
    dead_store.begin(vm, JournalOperation.REMOVE)
    held = locks.try_lock(fake_host.local.rooms.layout.lock(vm.id))
    assert held is not None
    remains = await asyncio.create_subprocess_exec("sleep", "0.3", pass_fds=[held])
    locks.release(held)
    async with make_host() as next_host:
        await assert_tidy(next_host)
    assert await remains.wait() == 0


async def test_a_spare_of_a_killed_host_is_removed_despite_a_held_lock(
    fake_host: AsyncHost, make_host: HostFactory
) -> None:
    """A host was killed while it made a spare, and its child, which is about to become a VMM, still
    holds the lock.
    """
    layout = fake_host.local.rooms.layout
    key = new_id()
    layout.instance(key).mkdir()
    program = (
        "import subprocess, sys; from pathlib import Path; from coppice.state import locks\n"
        "held = locks.try_lock(Path(sys.argv[1]))\n"
        "print(subprocess.Popen(['sleep', '0.3'], pass_fds=[held], stdout=subprocess.DEVNULL).pid)"
    )
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, layout.lock(key), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await killed.communicate()
    assert Path("/proc", said.decode().strip()).exists()
    assert locks.try_lock(layout.lock(key)) is None
    async with make_host() as next_host:
        await assert_tidy(next_host)


async def test_recovery_waits_only_so_long_for_held_locks(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One deadline covers all held locks, and free instances are resolved meanwhile."""
    monkeypatch.setattr(recovery, "_RELEASE_S", 0.2)
    held_ones = [await boot(fake_host, name) for name in ("oak", "elm")]
    free = await boot(fake_host, "fir")
    for vm in (*held_ones, free):
        dead_store.begin(vm, JournalOperation.REMOVE)
    held = [locks.try_lock(fake_host.local.rooms.layout.lock(vm.id)) for vm in held_ones]
    async with asyncio.timeout(10), make_host() as next_host:
        assert sorted(vm.name for vm in await next_host.ls()) == ["elm", "oak"]
    for descriptor in held:
        assert descriptor is not None
        locks.release(descriptor)
    async with make_host() as next_host:
        await assert_tidy(next_host)


async def test_a_vmm_stuck_in_its_exit_does_not_block_ls(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM that waits for a disk during its exit still exists.

    The look at it has a deadline, and shows all instances.
    """
    oak = await boot(fake_host)
    await make(fake_host, State.STOPPED, "elm")
    assert oak.vmm is not None
    wait_exit, waits = driver.wait_exit, asyncio.Event()

    async def never(*_: object) -> str:
        await waits.wait()
        return ""

    await kill(oak.vmm)
    monkeypatch.setattr(settling, "_ENDING_S", 0.1)
    monkeypatch.setattr(driver, "wait_exit", never)
    async with asyncio.timeout(10):
        assert [vm.name for vm in await fake_host.call(LsRequest())] == ["oak", "elm"]
    monkeypatch.setattr(driver, "wait_exit", wait_exit)
    assert (await fake_host.call(GetRequest(instance="oak"))).state is State.STOPPED


async def test_a_removal_that_was_killed_before_its_last_step(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """A lock file is removed after its record, so without a record it can go.

    A held one belongs to a removal under way, and stays.
    """
    vm = await boot(fake_host)
    layout = fake_host.local.rooms.layout
    stray, held = layout.lock(new_id()), layout.lock(new_id())
    stray.touch()
    descriptor = locks.try_lock(held)
    assert descriptor is not None
    async with make_host():
        assert sorted(layout.locks.iterdir()) == sorted([layout.lock(vm.id), held])
    locks.release(descriptor)
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")


async def launcher(
    program: Path, directory: Path, *words: str, inherit: tuple[int, ...] = ()
) -> tuple[asyncio.subprocess.Process, int]:
    """Start a process named like a launcher; writing to the descriptor makes it exec `words`."""
    named = program.parent / LAUNCHER
    if not named.exists():
        shutil.copy(shutil.which("sh") or "/bin/sh", named)
    go, tell = os.pipe()
    script = f'read word </proc/self/fd/{go}; exec "$@"'
    process = await asyncio.create_subprocess_exec(
        *(str(named), "-c", script, "sh", *words),
        cwd=directory,
        pass_fds=[go, *inherit],
        stdin=asyncio.subprocess.DEVNULL,
    )
    os.close(go)
    return process, tell


async def test_a_launcher_is_an_orphan_too(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, fake_vmm: Path
) -> None:
    """A host killed between starting the launcher and its exec must not leave a process that
    becomes a VMM later.
    """
    await make(fake_host, State.STANDBY)
    vm = await fake_host.call(GetRequest(instance="oak"))
    dead_store.begin(vm, JournalOperation.RESTORE)
    process, tell = await launcher(fake_vmm, fake_host.local.rooms.directory(vm.id), str(fake_vmm), "private")
    other, other_tell = await launcher(fake_vmm, fake_host.local.rooms.directory(vm.id), "sleep", "1000")
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
        assert found.state is State.STANDBY
    assert await asyncio.wait_for(process.wait(), 5) == -9
    assert other.returncode is None  # a launcher of another program is left alone
    for descriptor in (tell, other_tell):
        os.close(descriptor)
    other.kill()
    await other.wait()


async def test_a_launcher_that_becomes_the_vmm_meanwhile_does_not_escape(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store, fake_vmm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The launcher becomes the VMM between the search and the signal, so the search is repeated
    until it finds nothing.
    """
    await make(fake_host, State.STANDBY)
    vm = await fake_host.call(GetRequest(instance="oak"))
    dead_store.begin(vm, JournalOperation.RESTORE)
    ready, told = os.pipe()
    words = (str(fake_vmm), "private", "memory", str(vm.machine.memory_bytes), str(told), "memory.new")
    process, tell = await launcher(fake_vmm, fake_host.local.rooms.directory(vm.id), *words, inherit=(told,))
    real = driver.find_orphans

    def find(instances: Path) -> dict[Path, list[VmmProcess]]:
        found = real(instances)
        if found and Path(next(iter(found.values()))[0].executable).name == LAUNCHER:
            os.write(tell, b"go\n")
            while Path(f"/proc/{process.pid}/exe").readlink() != fake_vmm:  # an exec has no event
                pass
        return found

    monkeypatch.setattr(driver, "find_orphans", find)
    async with asyncio.timeout(20), make_host() as next_host:
        monkeypatch.undo()
        await assert_tidy(next_host, "oak")
    assert await asyncio.wait_for(process.wait(), 5) == -9
    for descriptor in (ready, told, tell):
        os.close(descriptor)


async def test_a_source_whose_host_died_while_its_disk_was_frozen_is_thawed(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store
) -> None:
    """No record says that the disk is frozen, and it would block writes for half a minute, so
    recovery thaws each running source.
    """
    vm = await boot(fake_host)
    directory = fake_host.local.rooms.directory(vm.id)
    dead_store.begin(vm, JournalOperation.FORK_RUNNING)
    await capture.freeze_disk(fake_host.local.rooms, vm)
    assert driver.guest_state(directory).frozen
    await driver.pause(directory)
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        assert not driver.guest_state(directory).frozen
        assert await ask(next_host, "oak", "hostname") == "oak"


@pytest.mark.parametrize("look", ["exec", "get", "ls", "inspect", "health"])
async def test_an_open_host_resolves_what_a_dead_process_left(
    fake_host: AsyncHost, driver: FakeDriver, dead_store: Store, look: str
) -> None:
    """A process died while it had the guest paused.

    A program that holds the data directory open for days must resolve that too.
    """
    vm = await boot(fake_host)
    dead_store.begin(vm, JournalOperation.STANDBY)
    await driver.pause(fake_host.local.rooms.directory(vm.id))
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "exec": lambda: ask(fake_host, "oak", "echo"),
        "get": lambda: fake_host.call(GetRequest(instance="oak")),
        "ls": fake_host.ls,
        "inspect": lambda: fake_host.call(InspectRequest(instance="oak")),
        "health": lambda: fake_host.call(HealthRequest(instance="oak")),
    }
    async with asyncio.timeout(10):
        await calls[look]()
    assert not await driver.is_paused(fake_host.local.rooms.directory(vm.id))
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("target", [State.RUNNING, State.STANDBY])
@pytest.mark.parametrize("atomic", [True, False])
async def test_an_atomic_fan_out_of_a_killed_host_leaves_all_or_none(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    dead_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    atomic: bool,
    target: State,
) -> None:
    """The host dies with one complete child; it stays only without `atomic`."""
    oak = await make(fake_host, State.TEMPLATE)
    rooms = msgspec.structs.replace(fake_host.local.rooms, store=dead_store)
    request = ForkRequest(instance="oak", count=2, names=["elm", "fir"], target=target, atomic=atomic)

    class Killed(BaseException):
        """Stands for SIGKILL: no code of the process runs after it."""

    save, save_all, whole = Store.save, Store.save_all, list[str]()

    def killed_before_the_second(
        store: Store, instance: Instance, *, done: bool = False, durable: bool = False
    ) -> None:
        count(instance)
        save(store, instance, done=done, durable=durable)

    def count(instance: Instance) -> None:
        if instance.state is target:
            whole.append(instance.id)
            if whole[0] != instance.id:
                raise Killed

    def killed_before_the_second_group(store: Store, instances: list[Instance], *, done: bool = False) -> set[str]:
        for instance in instances:
            count(instance)
        return save_all(store, instances, done=done)

    async def never(*_: object) -> None:
        """Skip the cleanup, as a dead process does."""

    async def record(children: list[Instance]) -> list[Instance]:
        return rooms.store.create(children, JournalOperation.FORK)

    monkeypatch.setattr(Store, "save", killed_before_the_second)
    monkeypatch.setattr(Store, "save_all", killed_before_the_second_group)
    monkeypatch.setattr(fanout, "_parallel", lambda: 1)  # so each child is recorded alone
    monkeypatch.setattr(fanout, "_SYNCS_AT_ONCE", 1)
    monkeypatch.setattr(fanout, "_abandon", never)
    monkeypatch.setattr(destroy, "destroy", never)
    monkeypatch.setattr(driver, "quit", never)
    with pytest.raises(Killed):
        await fanout.fan_out(rooms, oak, request, no_progress, owner=None, record=record)
    monkeypatch.undo()
    async with make_host() as host:
        left = {vm.name for vm in await host.call(LsRequest())} - {"oak"}
        assert len(left) == (0 if atomic else 1)
        assert left <= {"elm", "fir"}
        await assert_tidy(host, "oak", *left)


@pytest.mark.parametrize("operation", [JournalOperation.SNAPSHOT_RESTORE, JournalOperation.SNAPSHOT_RESTORE_COMMIT])
async def test_a_half_changed_source_is_not_forked(
    fake_host: AsyncHost, dead_store: Store, operation: JournalOperation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process died during a change of the source, so its files may be of two moments."""
    vm = await make(fake_host, State.STANDBY)

    async def too_early(*_: object, **__: object) -> Instance:
        dead_store.begin(vm, operation)
        return vm

    monkeypatch.setattr(recovery, "look", too_early)
    before = snapshot(fake_host)
    with pytest.raises(Busy, match="oak"):
        await fake_host.call(ForkRequest(instance="oak", names=["elm"]))
    monkeypatch.undo()
    after = snapshot(fake_host)
    assert (after[0], after[1], after[2], after[3]) == (before[0], before[1], [operation], before[3])


@pytest.mark.parametrize(
    "call",
    [boot, lambda host: host.call(ForkRequest(instance="stump", names=["oak"], atomic=True))],
    ids=["run", "fork"],
)
async def test_an_instance_removed_before_it_is_made_is_not_made(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, call: Callable[[AsyncHost], Awaitable[object]]
) -> None:
    """Another process may remove a new record before its maker locks it.

    Then no directory without a record may be made.
    """
    await make(fake_host, State.TEMPLATE, "stump")
    create, made = Store.create, list[Path]()

    def create_and_lose(store: Store, instances: list[Instance], *args: Any) -> list[Instance]:
        recorded = create(store, instances, *args)
        for instance in recorded:
            store.forget(instance.id)
        return recorded

    monkeypatch.setattr(Store, "create", create_and_lose)
    monkeypatch.setattr(directories, "create", made.append)
    with pytest.raises(NotFound):
        await call(fake_host)
    assert made == []
    await assert_tidy(fake_host, "stump")


def test_a_lock_file_that_is_made_during_the_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs a command makes a port's lock file during the removal."""
    doomed = tmp_path / "instance"
    doomed.mkdir()
    rmtree, calls = shutil.rmtree, list[Path]()

    def late(path: Path, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            (path / "port0.lock").touch()  # so the last step, the rmdir, fails, and the failure is ignored
        else:
            rmtree(path, ignore_errors=options["ignore_errors"])

    monkeypatch.setattr(shutil, "rmtree", late)
    directories.remove(doomed)
    assert list(tmp_path.iterdir()) == []


def test_no_process_has_the_start_time_of_the_dead_store() -> None:
    """The fixture `dead_store` depends on this."""
    assert start_ticks(1) != 1


async def test_a_machine_that_cannot_be_looked_at_is_listed_as_unknown(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record stays, and is right again when the VMM can be seen.

    To call the machine Running would be a guess.
    """
    await boot(fake_host)
    await boot(fake_host, "elm", start=False)

    def hidden(_: VmmProcess) -> bool:
        raise HostCannot("the kernel does not show it", hint="see the test")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "alive", hidden)
        assert [(vm.name, vm.state) for vm in await fake_host.call(LsRequest())] == [
            ("oak", State.UNKNOWN),
            ("elm", State.STOPPED),
        ]
        assert [vm.name for vm in await fake_host.call(LsRequest(state=State.UNKNOWN))] == ["oak"]
        assert [node.instance.state for node in await fake_host.tree()] == [State.UNKNOWN, State.STOPPED]
    assert (await fake_host.call(GetRequest(instance="oak"))).state is State.RUNNING
