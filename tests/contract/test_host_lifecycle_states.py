"""Lives of instances: legal transitions work, and illegal ones are refused and change nothing."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coppice.cli import lineage
from coppice.client import AsyncHost
from coppice.errors import IllegalTransition, InUse, InvalidName, NameTaken, NotFound, UsageError
from coppice.machine import directory as directories
from coppice.model import Instance, State, to_json
from coppice.model.inspection import StandbyReport
from coppice.model.lifecycle import Operation, legal_states
from coppice.requests import (
    DemoteRequest,
    ExecRequest,
    ForkRequest,
    GetRequest,
    InspectRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.requests.base import InstanceRequest
from coppice.state.journal import JournalOperation
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make, memory_of, snapshot
from fakes.records import make_instance
from fakes.rooms import IMAGE

CALLS: dict[Operation, Callable[[AsyncHost], Awaitable[object]]] = {
    Operation.START: lambda host: host.call(StartRequest(instance="oak")),
    Operation.STOP: lambda host: host.call(StopRequest(instance="oak")),
    Operation.STANDBY: lambda host: host.call(StandbyRequest(instance="oak")),
    Operation.RESTORE: lambda host: host.call(RestoreRequest(instance="oak")),
    Operation.PROMOTE: lambda host: host.call(PromoteRequest(instance="oak")),
    Operation.DEMOTE: lambda host: host.call(DemoteRequest(instance="oak")),
    Operation.FORK: lambda host: host.call(ForkRequest(instance="oak", names=["acorn"])),
    Operation.EXEC: lambda host: host.call(ExecRequest(instance="oak", argv=["echo"])),
}
ILLEGAL = [(operation, state) for operation in CALLS for state in State if state not in legal_states(operation)]


async def test_a_log_that_was_full_goes_on_at_the_next_start(fake_host: AsyncHost) -> None:
    """The newest lines are kept whole. Without the cut, a full log would take no later lines."""
    vm = await make(fake_host, State.STANDBY)
    log = fake_host.local.rooms.directory(vm.id) / files.CONSOLE_LOG
    before = log.read_bytes()
    log.write_bytes(before + b"noise of the guest\n" * (1 << 20))
    await fake_host.call(RestoreRequest(instance=vm.id))
    await ask(fake_host, vm, "print", "a new line")
    lines = log.read_bytes().splitlines()
    assert directories.LOG_KEPT - 100 < log.stat().st_size < directories.LOG_KEPT + 100
    assert set(lines[:-1]) == {b"noise of the guest"}
    assert lines[-1] == b"a new line"
    await fake_host.call(StandbyRequest(instance=vm.id))
    small = log.read_bytes()[-100:].partition(b"\n")[2]
    log.write_bytes(small)
    await fake_host.call(RestoreRequest(instance=vm.id))
    await ask(fake_host, vm, "print", "a newer line")
    assert log.read_bytes() == small + b"a newer line"


@pytest.mark.parametrize("call", [Operation.RESTORE, Operation.START])
async def test_a_machine_that_a_full_disk_paused_runs_on(fake_host: AsyncHost, call: Operation) -> None:
    """A VMM pauses a guest whose write finds no space.

    A restore or start lets it run on, and repeating that does no harm.
    """
    vm = await boot(fake_host)
    directory = fake_host.local.rooms.directory(vm.id)
    await fake_host.local.rooms.drivers.chosen.pause(directory)
    for _ in range(2):
        await CALLS[call](fake_host)
        assert not await fake_host.local.rooms.drivers.chosen.is_paused(directory)
    assert await ask(fake_host, vm, "echo", "on") == "on"


async def test_a_life_through_all_states(fake_host: AsyncHost) -> None:
    """Run, standby, restore, stop, start, promote, demote and remove give each state its name in
    the design, and leave nothing.
    """
    host = fake_host
    assert (await boot(host)).state == "Running"
    done = await host.call(StandbyRequest(instance="oak"))
    standby, report = done.instance, done.capture
    assert standby.state == "Standby"
    assert standby.vmm is None
    in_file = fake_host.local.rooms.drivers.chosen.capabilities.boots_in_file
    assert (report.ram_bytes_written == 0) == in_file  # the guest's RAM was in its file from the start
    assert (await host.call(RestoreRequest(instance="oak"))).state == "Running"
    stopped = await host.call(StopRequest(instance="oak"))
    assert (stopped.state, stopped.exit_reason, stopped.mem_file) == ("Stopped", "powered off", None)
    assert (await host.call(StartRequest(instance="oak"))).state == "Running"
    await host.call(StandbyRequest(instance="oak"))
    assert (await host.call(PromoteRequest(instance="oak"))).state == "Template"
    assert (await host.call(DemoteRequest(instance="oak"))).state == "Standby"
    assert (await host.call(RestoreRequest(instance="oak"))).state == "Running"
    await assert_tidy(host, "oak")
    await host.call(RmRequest(instance="oak"))
    await assert_tidy(host)


async def test_memory_lasts_over_standby_and_is_gone_with_a_stop(fake_host: AsyncHost) -> None:
    """Standby keeps RAM and disk, also in later rounds on a private mapping.

    A stop keeps the disk alone.
    """
    await boot(fake_host)
    await ask(fake_host, "oak", "save", "on disk")
    for round_number in ("1", "2", "3"):
        await ask(fake_host, "oak", "remember", "round", round_number)
        await ask(fake_host, "oak", "dirty", "20")
        report = (await fake_host.call(StandbyRequest(instance="oak"))).capture
        assert (report.dirty_bytes >= 20 * 4096) == (round_number != "1")
        await fake_host.call(RestoreRequest(instance="oak"))
        assert await ask(fake_host, "oak", "recall", "round") == round_number
    await fake_host.call(StopRequest(instance="oak"))
    await fake_host.call(StartRequest(instance="oak"))
    assert await ask(fake_host, "oak", "load") == "on disk"
    assert (await fake_host.call(ExecRequest(instance="oak", argv=["recall", "round"]))).exit_code == 1


async def test_a_booted_machine_gets_the_time_when_it_answers(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A boot may take half a minute on a loaded host, so a time noted at its start would set the
    clock back by that.
    """
    answering = driver.faults.hold_at("health")
    booting = asyncio.create_task(boot(fake_host))
    async with asyncio.timeout(10):
        await answering.reached.wait()
    up_ns = time.time_ns()
    answering.release.set()
    oak = await booting
    assert driver.guest_state(fake_host.local.rooms.directory(oak.id)).clock_ns >= up_ns


async def test_the_image_and_the_caller_define_the_process(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The image gives the entrypoint, the caller the command; the caller's variables win."""
    vm = await boot(fake_host, command=["--mine"], env={"FROM": "caller", "MORE": "1"}, hostname="host-1")
    state = driver.guest_state(fake_host.local.rooms.directory(vm.id))
    assert state.argv == ("/bin/init", "--mine")
    assert set(state.env) == {"FROM=caller", "MORE=1"}
    assert state.hostname == "host-1"
    assert (vm.process.workdir, vm.process.user) == ("/srv", "app")
    assert state.mac != ""
    assert len(state.machine_id) == 32


async def test_repeating_changes_nothing(fake_host: AsyncHost) -> None:
    """An operation whose result already holds succeeds, and touches no file, record or process."""
    host = fake_host
    kinds: dict[State, tuple[type[InstanceRequest[object]], ...]] = {
        State.RUNNING: (StartRequest, RestoreRequest),
        State.STANDBY: (StandbyRequest, DemoteRequest),
        State.TEMPLATE: (PromoteRequest,),
        State.STOPPED: (StopRequest,),
    }
    for state, requests in kinds.items():
        instance = await make(host, state, state.lower())
        before = snapshot(host)
        for kind in requests:
            result = await host.call(kind(instance=instance.id))
            assert (result.instance if isinstance(result, StandbyReport) else result) == instance
            assert snapshot(host) == before


@pytest.mark.parametrize(("operation", "state"), ILLEGAL, ids=lambda value: str(value))
async def test_an_illegal_operation_is_refused_and_changes_nothing(
    fake_host: AsyncHost, operation: Operation, state: State
) -> None:
    """Files, records, journal and processes stay the same.

    The refusal names the instance and its state, and has a hint.
    """
    await make(fake_host, state)
    before = snapshot(fake_host)
    with pytest.raises(IllegalTransition, match=f"oak is {state}") as refusal:
        await CALLS[operation](fake_host)
    assert refusal.value.hint
    assert snapshot(fake_host) == before


@pytest.mark.parametrize("state", list(State))
async def test_every_state_can_be_removed(fake_host: AsyncHost, state: State) -> None:
    """Removal works in every state, and leaves nothing."""
    await make(fake_host, state)
    await fake_host.call(RmRequest(instance="oak"))
    await assert_tidy(fake_host)
    with pytest.raises(NotFound):
        await fake_host.call(RmRequest(instance="oak"))
    await assert_tidy(fake_host)


async def test_a_template_with_forks_stays_a_template(fake_host: AsyncHost) -> None:
    """While its fork count is above 0 it is neither demoted nor removed.

    Both refusals name the forks.
    """
    await make(fake_host, State.TEMPLATE)
    await fake_host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2, target=State.STANDBY))
    before = snapshot(fake_host)
    for refused in (DemoteRequest(instance="oak"), RmRequest(instance="oak")):
        with pytest.raises(InUse, match=re.escape("2 forks (elm, fir)")):
            await fake_host.call(refused)
        assert snapshot(fake_host) == before
    assert (await fake_host.call(InspectRequest(instance="oak"))).forks == ("elm", "fir")
    await fake_host.call(RmRequest(instance="elm"))
    with pytest.raises(InUse, match=re.escape("1 fork (fir)")):
        await fake_host.call(DemoteRequest(instance="oak"))
    await fake_host.call(RmRequest(instance="fir"))
    assert (await fake_host.call(InspectRequest(instance="oak"))).fork_count == 0
    assert (await fake_host.call(DemoteRequest(instance="oak"))).state is State.STANDBY
    await assert_tidy(fake_host, "oak")


async def test_a_grandchild_counts_for_its_parent_alone(fake_host: AsyncHost) -> None:
    """Lineage is by parent: a grandchild does not keep the grandparent a template."""
    await make(fake_host, State.TEMPLATE)
    await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STANDBY))
    await fake_host.call(PromoteRequest(instance="elm"))
    await fake_host.call(ForkRequest(instance="elm", names=["fir"], target=State.STANDBY))
    nodes = await fake_host.tree()
    found = [(node.depth, node.instance.name, node.fork_count) for node in nodes]
    assert found == [(0, "oak", 1), (1, "elm", 1), (2, "fir", 0)]
    with pytest.raises(InUse, match="fir"):
        await fake_host.call(RmRequest(instance="elm"))


async def test_a_name_is_taken_once(fake_host: AsyncHost) -> None:
    """A Stopped instance keeps its name too, and nothing is made for the second."""
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
    """An invalid request is refused before anything is made."""
    before = snapshot(fake_host)
    with pytest.raises(error):
        await boot(fake_host, **options)
    assert snapshot(fake_host) == before


async def test_an_unknown_image_is_not_found(fake_host: AsyncHost) -> None:
    """A run with an unknown image makes nothing."""
    before = snapshot(fake_host)
    with pytest.raises(NotFound, match="nothing-here"):
        await fake_host.call(RunRequest(image="nothing-here"))
    assert snapshot(fake_host) == before


async def test_references_are_names_or_ids(fake_host: AsyncHost) -> None:
    """Both find the same instance; a string that can be neither is refused as invalid."""
    vm = await make(fake_host, State.STOPPED)
    assert (
        await fake_host.call(GetRequest(instance="oak"))
        == await fake_host.call(GetRequest(instance=vm.id))
        == await fake_host.call(GetRequest(instance=vm.id))
        == vm
    )
    for wrong in ("", "..", "a/b", "OAK", "a" * 64):
        with pytest.raises(InvalidName):
            await fake_host.call(GetRequest(instance=wrong))
    with pytest.raises(NotFound):
        await fake_host.call(GetRequest(instance="elm"))


async def test_ls_filters_by_state_and_tags(fake_host: AsyncHost) -> None:
    """The oldest comes first, and an instance must have all given tags."""
    await boot(fake_host, "a", start=False, tags={"team": "x", "tier": "1"})
    await boot(fake_host, "b", tags={"team": "x"})
    assert [vm.name for vm in await fake_host.call(LsRequest())] == ["a", "b"]
    assert [vm.name for vm in await fake_host.call(LsRequest(state=State.RUNNING))] == ["b"]
    assert [vm.name for vm in await fake_host.call(LsRequest(tags={"team": "x"}))] == ["a", "b"]
    assert [vm.name for vm in await fake_host.call(LsRequest(tags={"team": "x", "tier": "1"}))] == ["a"]
    assert await fake_host.call(LsRequest(tags={"team": "y"})) == []


async def test_a_kernel_in_use_is_not_removed(fake_host: AsyncHost) -> None:
    """The refusal names the instances, in any state, and the snapshots that need the kernel.

    Without them it can be removed.
    """
    key = "custom-6.1.0-0123abcd"
    directory = fake_host.local.rooms.layout.kernels / key
    directory.mkdir()
    (directory / "vmlinuz").touch()
    await boot(fake_host, kernel=key)
    await fake_host.call(SnapshotRequest(instance="oak", name="kept"))
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(PromoteRequest(instance="oak"))
    await boot(fake_host, "elm")  # with another kernel
    for users in ("kept, oak", "kept"):
        with pytest.raises(InUse, match=f"is used by {users};"):
            await fake_host.kernels.rm(key)
        assert (directory / "vmlinuz").exists()
        if "oak" in users:
            await fake_host.call(RmRequest(instance="oak"))
    await fake_host.snapshots.rm("kept")
    await fake_host.kernels.rm(key)
    assert not directory.exists()
    assert not list(directory.parent.glob(".*"))
    for gone in (key, "../instances", "no-such"):
        with pytest.raises(NotFound, match="no kernel"):
            await fake_host.kernels.rm(gone)


async def test_a_kernel_removed_while_a_machine_is_made(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is removed after `run` has found it and before the record exists.

    The run is refused, and no instance lacks its kernel.
    """
    key = "custom-6.1.0-0123abcd"
    (fake_host.local.rooms.layout.kernels / key).mkdir()
    create = fake_host.local.rooms.store.create

    def late(*arguments: Any) -> Any:
        asyncio.run_coroutine_threadsafe(fake_host.kernels.rm(key), loop).result(10)
        return create(*arguments)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(fake_host.local.rooms.store, "create", late)
    with pytest.raises(NotFound, match="no kernel"):
        await boot(fake_host, kernel=key, start=False)
    assert await fake_host.call(LsRequest()) == []


async def test_an_image_in_use_is_not_removed(fake_host: AsyncHost) -> None:
    """The refusal names the instance. When that is removed, the image can be removed too."""
    await make(fake_host, State.STOPPED)
    with pytest.raises(InUse, match="oak"):
        await fake_host.images.rm(IMAGE)
    await fake_host.call(RmRequest(instance="oak"))
    await fake_host.images.rm(IMAGE)
    with pytest.raises(NotFound):
        await fake_host.images.inspect(IMAGE)


async def test_blocks_clean_up_after_themselves(fake_host: AsyncHost) -> None:
    """`run` and `fork` as blocks remove their machines, also when the block fails."""
    await make(fake_host, State.TEMPLATE)

    async def fail_among_forks() -> None:
        async with (await fake_host.get("oak")).fork(3, atomic=True) as forks:
            assert len({memory_of(fake_host, fork.record).stat().st_ino for fork in forks}) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_among_forks()
    await assert_tidy(fake_host, "oak")
    async with fake_host.run(IMAGE) as vm:
        assert await ask(fake_host, vm.id, "hostname") == vm.name
    await assert_tidy(fake_host, "oak")


async def test_a_graceful_stop_that_takes_too_long_becomes_a_hard_one(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A guest that does not power off in time is ended.

    Without a grace period it is ended at once.
    """
    await boot(fake_host)
    gate = driver.faults.hold_at("poweroff")
    stopped = await fake_host.call(StopRequest(instance="oak", grace_s=0.05))
    gate.release.set()
    assert (stopped.state, stopped.exit_reason) == (State.STOPPED, "stopped hard")
    await fake_host.call(StartRequest(instance="oak"))
    assert (await fake_host.call(StopRequest(instance="oak", grace_s=0))).exit_reason == "stopped hard"
    assert driver.faults.reached["poweroff"] == 1
    with pytest.raises(UsageError):
        await fake_host.call(StopRequest(instance="oak", grace_s=-1))
    await assert_tidy(fake_host, "oak")


async def test_a_lineage_of_thousands_of_generations_can_be_drawn(fake_host: AsyncHost) -> None:
    """No function walks it by recursion, and its JSON is not nested."""
    generations = 3000
    parent: Instance | None = None
    made = []
    for number in range(generations):
        parent = make_instance(f"vm-{number}", parent=parent.id if parent else None)
        made.append(parent)
    fake_host.local.rooms.store.create(made, JournalOperation.RUN)
    fake_host.local.rooms.store.finish(made, JournalOperation.RUN)
    nodes = await fake_host.tree()
    assert [node.depth for node in nodes] == list(range(generations))
    assert len(json.loads(to_json(nodes))) == generations
    leads = lineage._leads(nodes)
    assert (leads[0], leads[1], len(leads[-1])) == ("", "└── ", 4 * (generations - 1))
    assert len(await fake_host.tree("vm-2990")) == 10
