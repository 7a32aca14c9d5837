"""Whole lives of instances: every legal way between states, and every illegal one refused before it touches anything."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coppice.errors import IllegalTransition, InUse, InvalidName, NameTaken, NotFound, UsageError
from coppice.host import AsyncHost
from coppice.instance import directory as directories
from coppice.lifecycle import Operation, legal_states
from coppice.model import State
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, memory_of, snapshot
from fakes.rooms import IMAGE

CALLS: dict[Operation, Callable[[AsyncHost], Awaitable[object]]] = {
    Operation.START: lambda host: host.start("oak"),
    Operation.STOP: lambda host: host.stop("oak"),
    Operation.STANDBY: lambda host: host.standby("oak"),
    Operation.RESTORE: lambda host: host.restore("oak"),
    Operation.PROMOTE: lambda host: host.promote("oak"),
    Operation.DEMOTE: lambda host: host.demote("oak"),
    Operation.FORK: lambda host: host.fork("oak", names=["acorn"]),
    Operation.EXEC: lambda host: host.exec("oak", ["echo"]),
}
ILLEGAL = [(operation, state) for operation in CALLS for state in State if state not in legal_states(operation)]


async def test_a_log_that_was_full_goes_on_at_the_next_start(fake_host: AsyncHost) -> None:
    """Its newest lines are kept, whole; a log that no VMM could append to any more would hide all that comes later."""
    vm = await make(fake_host, State.STANDBY)
    log = fake_host.rooms.directory(vm.id) / files.CONSOLE_LOG
    before = log.read_bytes()
    log.write_bytes(before + b"noise of the guest\n" * (1 << 20))
    await fake_host.restore(vm)
    lines = log.read_bytes().splitlines()
    assert directories.LOG_KEPT - 100 < log.stat().st_size < directories.LOG_KEPT + 100
    assert set(lines[:-1]) == {b"noise of the guest"}
    assert lines[-1] == b"the fake guest runs"
    await fake_host.standby(vm)
    small = log.read_bytes()[-100:].partition(b"\n")[2]
    log.write_bytes(small)
    await fake_host.restore(vm)
    assert log.read_bytes() == small + b"the fake guest runs\n"


@pytest.mark.parametrize("call", [Operation.RESTORE, Operation.START])
async def test_a_machine_that_a_full_disk_paused_runs_on(fake_host: AsyncHost, call: Operation) -> None:
    """A VMM pauses a guest whose write finds no room. Nothing else would ever let it run on; to ask for it again does no harm."""
    vm = await boot(fake_host)
    directory = fake_host.rooms.directory(vm.id)
    await fake_host.rooms.driver.pause(directory)
    for _ in range(2):
        await CALLS[call](fake_host)
        assert not await fake_host.rooms.driver.is_paused(directory)
    assert await ask(fake_host, vm, "echo", "on") == "on"


async def test_a_whole_life(fake_host: AsyncHost) -> None:
    """Run, standby, restore, stop, start, standby, promote, demote, restore, remove: each state as the design spells it, nothing left."""
    host = fake_host
    assert (await boot(host)).state == "Running"
    standby, report = await host.standby("oak")
    assert standby.state == "Standby"
    assert standby.vmm is None
    assert report.ram_bytes_written == 0  # the guest's RAM was its file all along
    assert (await host.restore("oak")).state == "Running"
    stopped = await host.stop("oak")
    assert (stopped.state, stopped.exit_reason, stopped.mem_file) == ("Stopped", "powered off", None)
    assert (await host.start("oak")).state == "Running"
    await host.standby("oak")
    assert (await host.promote("oak")).state == "Template"
    assert (await host.demote("oak")).state == "Standby"
    assert (await host.restore("oak")).state == "Running"
    await assert_tidy(host, "oak")
    await host.rm("oak")
    await assert_tidy(host)


async def test_memory_lasts_over_standby_and_is_gone_with_a_stop(fake_host: AsyncHost) -> None:
    """Standby keeps RAM and disk, even after a second round on a private mapping; a stop keeps the disk alone."""
    await boot(fake_host)
    await ask(fake_host, "oak", "save", "on disk")
    for round_number in ("1", "2", "3"):
        await ask(fake_host, "oak", "remember", "round", round_number)
        await ask(fake_host, "oak", "dirty", "20")
        _, report = await fake_host.standby("oak")
        assert (report.dirty_bytes >= 20 * 4096) == (round_number != "1")
        await fake_host.restore("oak")
        assert await ask(fake_host, "oak", "recall", "round") == round_number
    await fake_host.stop("oak")
    await fake_host.start("oak")
    assert await ask(fake_host, "oak", "load") == "on disk"
    assert (await fake_host.exec("oak", ["recall", "round"])).exit_code == 1


async def test_a_booted_machine_is_told_the_time_when_it_can_hear_it(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A boot takes seconds, on a loaded host half a minute: a time that was written down at its beginning would put the clock back by that."""
    answering = driver.faults.hold_at("health")
    booting = asyncio.create_task(boot(fake_host))
    async with asyncio.timeout(10):
        await answering.reached.wait()
    up_ns = time.time_ns()
    answering.release.set()
    oak = await booting
    assert driver.guest_state(fake_host.rooms.directory(oak.id)).clock_ns >= up_ns


async def test_what_the_image_says_is_run(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Entrypoint of the image with the caller's command, the image's variables with the caller's over them."""
    vm = await boot(fake_host, command=["--mine"], env={"FROM": "caller", "MORE": "1"}, hostname="host-1")
    state = driver.guest_state(fake_host.rooms.directory(vm.id))
    assert state.argv == ("/bin/init", "--mine")
    assert set(state.env) == {"FROM=caller", "MORE=1"}
    assert state.hostname == "host-1"
    assert (vm.process.workdir, vm.process.user) == ("/srv", "app")
    assert state.mac != ""
    assert len(state.machine_id) == 32


async def test_repeating_changes_nothing(fake_host: AsyncHost) -> None:
    """An operation whose result holds already is a success that touches no file, record or process."""
    host = fake_host
    for state, calls in {
        State.RUNNING: (host.start, host.restore),
        State.STANDBY: (host.standby, host.demote),
        State.TEMPLATE: (host.promote,),
        State.STOPPED: (host.stop,),
    }.items():
        instance = await make(host, state, state.lower())
        before = snapshot(host)
        for call in calls:
            result = await call(instance)  # type: ignore[operator]  # the union of their signatures is not seen to be callable
            assert (result[0] if isinstance(result, tuple) else result) == instance
            assert snapshot(host) == before


@pytest.mark.parametrize(("operation", "state"), ILLEGAL, ids=lambda value: str(value))
async def test_the_illegal_is_refused_before_it_touches_anything(
    fake_host: AsyncHost, operation: Operation, state: State
) -> None:
    """Files, records, journal and processes are the same as before; the refusal names the instance, its state and the way out."""
    await make(fake_host, state)
    before = snapshot(fake_host)
    with pytest.raises(IllegalTransition, match=f"oak is {state}") as refusal:
        await CALLS[operation](fake_host)
    assert refusal.value.hint
    assert snapshot(fake_host) == before


@pytest.mark.parametrize("state", list(State))
async def test_every_state_can_be_removed(fake_host: AsyncHost, state: State) -> None:
    """Removal is the way out of everything, and leaves nothing."""
    await make(fake_host, state)
    await fake_host.rm("oak")
    await assert_tidy(fake_host)
    with pytest.raises(NotFound):
        await fake_host.rm("oak")
    await assert_tidy(fake_host)


async def test_a_template_with_forks_stays_one(fake_host: AsyncHost) -> None:
    """Neither demoted nor removed while the fork count is above 0; both refusals name the forks, and touch nothing."""
    await make(fake_host, State.TEMPLATE)
    await fake_host.fork("oak", names=["elm", "fir"], count=2, target=State.STANDBY)
    before = snapshot(fake_host)
    for refused in (fake_host.demote, fake_host.rm):
        with pytest.raises(InUse, match=re.escape("2 forks (elm, fir)")):
            await refused("oak")
        assert snapshot(fake_host) == before
    assert (await fake_host.inspect("oak")).forks == ("elm", "fir")
    await fake_host.rm("elm")
    with pytest.raises(InUse, match=re.escape("1 fork (fir)")):
        await fake_host.demote("oak")
    await fake_host.rm("fir")
    assert (await fake_host.inspect("oak")).fork_count == 0
    assert (await fake_host.demote("oak")).state is State.STANDBY
    await assert_tidy(fake_host, "oak")


async def test_a_forks_forks_are_its_own(fake_host: AsyncHost) -> None:
    """Lineage is by parent: a grandchild does not keep the grandparent a template."""
    await make(fake_host, State.TEMPLATE)
    await fake_host.fork("oak", names=["elm"], target=State.STANDBY)
    await fake_host.promote("elm")
    await fake_host.fork("elm", names=["fir"], target=State.STANDBY)
    (root,) = await fake_host.tree()
    assert (root.instance.name, root.fork_count) == ("oak", 1)
    assert root.children[0].instance.name == "elm"
    assert root.children[0].children[0].instance.name == "fir"
    with pytest.raises(InUse, match="fir"):
        await fake_host.rm("elm")


async def test_a_name_is_taken_once(fake_host: AsyncHost) -> None:
    """Also by something that is Stopped; nothing is made for the second."""
    await make(fake_host, State.STOPPED)
    before = snapshot(fake_host)
    with pytest.raises(NameTaken, match="oak"):
        await boot(fake_host)
    assert snapshot(fake_host) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": "../x"}, InvalidName),
        ({"name": ""}, InvalidName),
        ({"hostname": "a.b"}, InvalidName),
        ({"env": {"A B": ""}}, UsageError),
        ({"env": {"A": "\0"}}, UsageError),
        ({"tags": {"": ""}}, UsageError),
        ({"tags": {"a": "\udcff"}}, UsageError),
        ({"env": {"A": "\udcff"}}, UsageError),
        ({"command": ["\udcff"]}, UsageError),
        ({"workdir": "/\udcff"}, UsageError),
        ({"command": ["a\0b"]}, UsageError),
        ({"cpus": 0}, UsageError),
        ({"kernel": "../../etc"}, NotFound),
    ],
    ids=str,
)
async def test_a_bad_request_makes_nothing(
    fake_host: AsyncHost, options: dict[str, Any], error: type[Exception]
) -> None:
    """What can never be is refused before anything is made for it."""
    before = snapshot(fake_host)
    with pytest.raises(error):
        await boot(fake_host, **options)
    assert snapshot(fake_host) == before


async def test_an_unknown_image_is_not_found(fake_host: AsyncHost) -> None:
    """And nothing is made."""
    before = snapshot(fake_host)
    with pytest.raises(NotFound, match="nothing-here"):
        await fake_host.run("nothing-here")
    assert snapshot(fake_host) == before


async def test_references_are_names_ids_or_records(fake_host: AsyncHost) -> None:
    """All three mean the same instance; what can be neither name nor id is refused as such."""
    vm = await make(fake_host, State.STOPPED)
    assert await fake_host.get("oak") == await fake_host.get(vm.id) == await fake_host.get(vm) == vm
    for wrong in ("", "..", "a/b", "OAK", "a" * 64):
        with pytest.raises(InvalidName):
            await fake_host.get(wrong)
    with pytest.raises(NotFound):
        await fake_host.get("elm")


async def test_ls_filters_by_state_and_tags(fake_host: AsyncHost) -> None:
    """Oldest first; all tags must be there."""
    await boot(fake_host, "a", start=False, tags={"team": "x", "tier": "1"})
    await boot(fake_host, "b", tags={"team": "x"})
    assert [vm.name for vm in await fake_host.ls()] == ["a", "b"]
    assert [vm.name for vm in await fake_host.ls(state=State.RUNNING)] == ["b"]
    assert [vm.name for vm in await fake_host.ls(tags={"team": "x"})] == ["a", "b"]
    assert [vm.name for vm in await fake_host.ls(tags={"team": "x", "tier": "1"})] == ["a"]
    assert await fake_host.ls(tags={"team": "y"}) == []


async def test_a_kernel_in_use_is_not_removed(fake_host: AsyncHost) -> None:
    """The refusal names who could not be started without it, in whatever state, snapshots too; when they are gone, it goes."""
    key = "custom-6.1.0-0123abcd"
    directory = fake_host.rooms.layout.kernels / key
    directory.mkdir()
    (directory / "vmlinuz").touch()
    await boot(fake_host, kernel=key)
    await fake_host.snapshot_create("oak", name="kept")
    await fake_host.standby("oak")
    await fake_host.promote("oak")
    await boot(fake_host, "elm")  # with another kernel
    for users in ("kept, oak", "kept"):
        with pytest.raises(InUse, match=f"is used by {users};"):
            await fake_host.kernel_rm(key)
        assert (directory / "vmlinuz").exists()
        if "oak" in users:
            await fake_host.rm("oak")
    await fake_host.snapshot_rm("kept")
    await fake_host.kernel_rm(key)
    assert not directory.exists()
    assert not list(directory.parent.glob(".*"))
    for gone in (key, "../instances", "no-such"):
        with pytest.raises(NotFound, match="no kernel"):
            await fake_host.kernel_rm(gone)


async def test_a_kernel_that_goes_while_a_machine_is_made(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed after `run` has found it and before there is a record: refused, and no instance is left without its kernel."""
    key = "custom-6.1.0-0123abcd"
    (fake_host.rooms.layout.kernels / key).mkdir()
    create = fake_host.rooms.store.create

    def late(*arguments: Any) -> Any:
        asyncio.run_coroutine_threadsafe(fake_host.kernel_rm(key), loop).result(10)
        return create(*arguments)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(fake_host.rooms.store, "create", late)
    with pytest.raises(NotFound, match="no kernel"):
        await boot(fake_host, kernel=key, start=False)
    assert await fake_host.ls() == []


async def test_an_image_in_use_is_not_removed(fake_host: AsyncHost) -> None:
    """The refusal names the instance; when that is gone, the image goes."""
    await make(fake_host, State.STOPPED)
    with pytest.raises(InUse, match="oak"):
        await fake_host.image_rm(IMAGE)
    await fake_host.rm("oak")
    await fake_host.image_rm(IMAGE)
    with pytest.raises(NotFound):
        await fake_host.image_inspect(IMAGE)


async def test_blocks_clean_up_after_themselves(fake_host: AsyncHost) -> None:
    """`machine` and `forks` remove what they made, also when the block fails."""
    await make(fake_host, State.TEMPLATE)

    async def fail_among_forks() -> None:
        async with fake_host.forks("oak", 3) as forks:
            assert len({memory_of(fake_host, fork).stat().st_ino for fork in forks}) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_among_forks()
    await assert_tidy(fake_host, "oak")
    async with fake_host.machine(IMAGE) as vm:
        assert await ask(fake_host, vm, "hostname") == vm.name
    await assert_tidy(fake_host, "oak")


async def test_a_graceful_stop_that_takes_too_long_becomes_a_hard_one(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A guest that does not power off in time is ended, and so is one that is not asked."""
    await boot(fake_host)
    gate = driver.faults.hold_at("poweroff")
    stopped = await fake_host.stop("oak", grace_s=0.05)
    gate.release.set()
    assert (stopped.state, stopped.exit_reason) == (State.STOPPED, "stopped hard")
    await fake_host.start("oak")
    assert (await fake_host.stop("oak", grace_s=0)).exit_reason == "stopped hard"
    assert driver.faults.reached["poweroff"] == 1
    with pytest.raises(UsageError):
        await fake_host.stop("oak", grace_s=-1)
    await assert_tidy(fake_host, "oak")
