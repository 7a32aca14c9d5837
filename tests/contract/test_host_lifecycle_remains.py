"""What is left of a killed process for a moment: a lock, a launcher that is to become a VMM, a frozen disk, a record that is half true."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import HostFactory
from coppice.errors import Busy, NotFound
from coppice.host import AsyncHost
from coppice.instance import capture, live, recovery, rollback
from coppice.instance import directory as directories
from coppice.model import Instance, State, VmmProcess
from coppice.names import new_id
from coppice.store import locks
from coppice.store.store import Store
from coppice.vmm.process import kill, start_ticks
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, snapshot


@pytest.fixture
def dead_store(fake_host: AsyncHost) -> Iterator[Store]:
    """The database as a process that is dead now had it open; no process has this start time."""
    store = Store(fake_host.rooms.layout.database, (1, 1))
    yield store
    store.close()


async def test_a_lock_that_outlives_its_process_for_a_moment(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store
) -> None:
    """A child between fork and exec has the locks of the host that was killed: recovery waits for it, and leaves no row to the next one."""
    vm = await boot(fake_host)
    dead_store.begin(vm, "rm")
    held = locks.try_lock(fake_host.rooms.layout.lock(vm.id))
    assert held is not None
    remains = await asyncio.create_subprocess_exec("sleep", "0.3", pass_fds=[held])
    locks.release(held)
    async with make_host() as next_host:
        await assert_tidy(next_host)
    assert await remains.wait() == 0


async def test_who_holds_on_does_not_keep_the_data_directory_closed(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait has an end, for all that is held together; what is free is resolved all the same."""
    monkeypatch.setattr(recovery, "_RELEASE_S", 0.2)
    held_ones = [await boot(fake_host, name) for name in ("oak", "elm")]
    free = await boot(fake_host, "fir")
    for vm in (*held_ones, free):
        dead_store.begin(vm, "rm")
    held = [locks.try_lock(fake_host.rooms.layout.lock(vm.id)) for vm in held_ones]
    async with asyncio.timeout(10), make_host() as next_host:
        assert sorted(vm.name for vm in await next_host.ls()) == ["elm", "oak"]
    for descriptor in held:
        assert descriptor is not None
        locks.release(descriptor)
    async with make_host() as next_host:
        await assert_tidy(next_host)


async def test_a_vmm_that_does_not_get_to_its_end_keeps_nobody(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for a disk in the midst of its exit has no program any more, and is not gone: the look has an end, and shows the others."""
    oak = await boot(fake_host)
    await make(fake_host, State.STOPPED, "elm")
    assert oak.vmm is not None
    wait_exit, waits = driver.wait_exit, asyncio.Event()

    async def never(*_: object) -> str:
        await waits.wait()
        return ""

    await kill(oak.vmm)
    monkeypatch.setattr(recovery, "_ENDING_S", 0.1)
    monkeypatch.setattr(driver, "wait_exit", never)
    async with asyncio.timeout(10):
        assert [vm.name for vm in await fake_host.ls()] == ["oak", "elm"]
    monkeypatch.setattr(driver, "wait_exit", wait_exit)
    assert (await fake_host.get("oak")).state is State.STOPPED


async def test_a_removal_that_was_killed_before_its_last_step(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """The lock file goes after the record: alone it is nobody's. One that somebody holds may be about to go, and is left to him."""
    vm = await boot(fake_host)
    layout = fake_host.rooms.layout
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
    """A process named as a launcher is, that becomes what `words` say when the returned descriptor is written to."""
    named = program.parent / "prlimit"
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
    """Killed between starting the launcher and the VMM that it becomes: nobody may find a machine there later."""
    await make(fake_host, State.STANDBY)
    vm = await fake_host.get("oak")
    dead_store.begin(vm, "restore")
    process, tell = await launcher(fake_vmm, fake_host.rooms.directory(vm.id), str(fake_vmm), "private")
    other, other_tell = await launcher(fake_vmm, fake_host.rooms.directory(vm.id), "sleep", "1000")
    async with make_host() as next_host:
        (found,) = await assert_tidy(next_host, "oak")
        assert found.state is State.STANDBY
    assert await asyncio.wait_for(process.wait(), 5) == -9
    assert other.returncode is None  # whatever else somebody launches there is theirs
    for descriptor in (tell, other_tell):
        os.close(descriptor)
    other.kill()
    await other.wait()


async def test_a_launcher_that_becomes_the_vmm_meanwhile_does_not_escape(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store, fake_vmm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Between the look and the signal it is another program: it is looked for until none is left."""
    await make(fake_host, State.STANDBY)
    vm = await fake_host.get("oak")
    dead_store.begin(vm, "restore")
    ready, told = os.pipe()
    words = (str(fake_vmm), "private", "memory", str(vm.machine.memory_bytes), str(told))
    process, tell = await launcher(fake_vmm, fake_host.rooms.directory(vm.id), *words, inherit=(told,))
    real = driver.find_orphans

    def find(instances: Path) -> dict[Path, list[VmmProcess]]:
        found = real(instances)
        if found and Path(next(iter(found.values()))[0].executable).name == "prlimit":
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
    """That it is frozen is recorded nowhere, and it would not write for half a minute: recovery thaws whatever ran."""
    vm = await boot(fake_host)
    directory = fake_host.rooms.directory(vm.id)
    dead_store.begin(vm, live.OPERATION)
    await capture.freeze_disk(fake_host.rooms, vm)
    assert driver.guest_state(directory).frozen
    await driver.pause(directory)
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        assert not driver.guest_state(directory).frozen
        assert await ask(next_host, "oak", "hostname") == "oak"


@pytest.mark.parametrize("look", ["exec", "get", "ls", "inspect", "health"])
async def test_a_host_that_is_open_already_resolves_what_another_left(
    fake_host: AsyncHost, driver: FakeDriver, dead_store: Store, look: str
) -> None:
    """A process died while it had the guest paused: a program that holds the data directory open for days does not wait for somebody to open it anew."""
    vm = await boot(fake_host)
    dead_store.begin(vm, capture.OPERATION)
    await driver.pause(fake_host.rooms.directory(vm.id))
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "exec": lambda: ask(fake_host, "oak", "echo"),
        "get": lambda: fake_host.get("oak"),
        "ls": fake_host.ls,
        "inspect": lambda: fake_host.inspect("oak"),
        "health": lambda: fake_host.health("oak"),
    }
    async with asyncio.timeout(10):
        await calls[look]()
    assert not await driver.is_paused(fake_host.rooms.directory(vm.id))
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("operation", [rollback.OPERATION, rollback.COMMITTED])
async def test_nobody_forks_what_is_half_changed(
    fake_host: AsyncHost, dead_store: Store, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process died in the midst of a change just before the fork had its lock: the files may be of two moments."""
    vm = await make(fake_host, State.STANDBY)

    async def too_early(*_: object, **__: object) -> Instance:
        dead_store.begin(vm, operation)
        return vm

    monkeypatch.setattr(recovery, "look", too_early)
    before = snapshot(fake_host)
    with pytest.raises(Busy, match="oak"):
        await fake_host.fork("oak", names=["elm"])
    monkeypatch.undo()
    after = snapshot(fake_host)
    assert (after[0], after[1], after[2], after[3]) == (before[0], before[1], [operation], before[3])


@pytest.mark.parametrize(
    "call", [boot, lambda host: host.fork("stump", names=["oak"], atomic=True)], ids=["run", "fork"]
)
async def test_what_was_removed_before_it_was_made_is_not_made(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, call: Callable[[AsyncHost], Awaitable[object]]
) -> None:
    """Another process may remove a new record before its maker holds it: then nothing may come to be that no record names."""
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
    """Who had the directory open, to run a command there, makes a port's lock file in it between the last look and the end of the removal."""
    doomed = tmp_path / "instance"
    doomed.mkdir()
    rmtree, calls = shutil.rmtree, list[Path]()

    def late(path: Path, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            (path / "port0.lock").touch()  # so the last step, to remove the directory, fails, which is ignored
        else:
            rmtree(path, ignore_errors=options["ignore_errors"])

    monkeypatch.setattr(shutil, "rmtree", late)
    directories.remove(doomed)
    assert list(tmp_path.iterdir()) == []


def test_no_process_has_the_start_time_of_the_dead_store() -> None:
    """What these tests rest on."""
    assert start_ticks(1) != 1
