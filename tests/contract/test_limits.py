"""Limits of instances: asked for, kept, shown, and gone with the VMM. The tree of control groups is a
directory of the test.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import HostCannot, UsageError
from coppice.linux import cgroup_tree
from coppice.machine import limits
from coppice.model import MIB, Limits, State
from coppice.requests import (
    ForkRequest,
    GetRequest,
    InspectRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
    StatsRequest,
    StopRequest,
    WaitRequest,
)
from fakes.hosting import assert_tidy, boot, make
from trees import make_tree

LIMITS = Limits(memory_bytes=300 * MIB, cpus=1.5, pids=100)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The topmost group; a group is a directory with what was written to it."""
    top = make_tree(tmp_path / "root", "/own")
    monkeypatch.setattr(limits, "ROOT", tmp_path / "root")
    monkeypatch.setattr(cgroup_tree, "_write", lambda path, text: path.write_text(text))
    monkeypatch.setattr(cgroup_tree, "remove", lambda group: shutil.rmtree(group, ignore_errors=True))
    return top


def groups(tree: Path) -> dict[str, dict[str, str]]:
    """The groups of VMMs, with their settings, by instance."""
    return {
        group.name.removeprefix("coppice-"): {file.name: file.read_text() for file in group.glob("*.max")}
        for group in tree.glob("coppice-*")
    }


SETTINGS = {"memory.max": str(300 * MIB), "cpu.max": "150000 100000", "pids.max": "100"}


async def test_a_group_lives_as_long_as_the_vmm(fake_host: AsyncHost, tree: Path) -> None:
    """Through stop, start, standby and restore the limits stay, and no group is left in between."""
    vm = await boot(fake_host, limits=LIMITS)
    assert groups(tree) == {vm.id: SETTINGS}
    for end, begin in ((StopRequest, StartRequest), (StandbyRequest, RestoreRequest)):
        await fake_host.call(end(instance="oak"))
        assert groups(tree) == {}
        await fake_host.call(begin(instance="oak"))
        assert groups(tree) == {vm.id: SETTINGS}
    assert (await fake_host.call(GetRequest(instance="oak"))).limits == LIMITS
    await fake_host.call(RmRequest(instance="oak"))
    assert groups(tree) == {}


async def test_forks_have_the_limits_of_their_source_or_their_own(fake_host: AsyncHost, tree: Path) -> None:
    """Of a template, of a running machine and of a snapshot. No limits at all is a choice too."""
    await make(fake_host, State.RUNNING, limits=LIMITS)
    live = await fake_host.call(ForkRequest(instance="oak", from_running=True, atomic=True, names=["live"]))
    assert groups(tree)[live.instances[0].id] == SETTINGS
    await fake_host.call(SnapshotRequest(instance="oak", name="moment"))
    kept = await fake_host.call(SnapshotForkRequest(snapshot="moment", atomic=True))
    assert groups(tree)[kept.instances[0].id] == SETTINGS
    await fake_host.call(StandbyRequest(instance="oak"))
    other = await fake_host.call(ForkRequest(instance="oak", limits=Limits(pids=50), atomic=True))
    assert groups(tree)[other.instances[0].id] == {"pids.max": "50"}
    free = await fake_host.call(ForkRequest(instance="oak", limits=Limits(), atomic=True))
    assert free.instances[0].id not in groups(tree)
    assert free.instances[0].limits == Limits()


async def test_a_spare_is_used_only_with_the_limits_that_it_was_started_with(fake_host: AsyncHost, tree: Path) -> None:
    """Its group has those of the template."""
    await make(fake_host, State.TEMPLATE, limits=LIMITS)
    await (await fake_host.get("oak")).start_ahead(1)
    assert len(groups(tree)) == 1
    for wanted, ahead in ((Limits(pids=60), False), (None, True)):
        report = await fake_host.call(ForkRequest(instance="oak", limits=wanted, atomic=True))
        assert report.results[0].started_ahead is ahead
        assert groups(tree)[report.instances[0].id] == ({"pids.max": "60"} if wanted else SETTINGS)


async def test_what_is_used_is_shown(fake_host: AsyncHost, tree: Path) -> None:
    """Only of an instance with limits: nothing counts the others."""
    vm = await boot(fake_host, limits=LIMITS)
    await boot(fake_host, "elm")
    group = tree / f"coppice-{vm.id}"
    for name, text in (("memory.current", "4096\n"), ("cpu.stat", "usage_usec 2500000\n"), ("pids.current", "7\n")):
        (group / name).write_text(text)
    shown = await fake_host.call(InspectRequest(instance="oak"))
    assert shown.memory is not None
    assert shown.memory.usage is not None
    assert (shown.memory.usage.memory_bytes, shown.memory.usage.cpu_s, shown.memory.usage.tasks) == (4096, 2.5, 7)
    stats = await fake_host.call(StatsRequest())
    assert stats["oak"].usage == shown.memory.usage
    assert stats["elm"].usage is None


async def test_a_vmm_that_exceeded_its_memory_is_said_so(fake_host: AsyncHost, tree: Path) -> None:
    """The kernel ended it: the reason has the limit, and the group is gone."""
    vm = await boot(fake_host, limits=LIMITS)
    assert vm.vmm is not None
    (tree / f"coppice-{vm.id}" / "memory.events").write_text("oom 1\noom_kill 1\n")
    os.kill(vm.vmm.pid, signal.SIGKILL)
    await fake_host.call(WaitRequest(instance="oak", deadline_s=10))
    seen = await fake_host.call(GetRequest(instance="oak"))
    assert (seen.state, seen.exit_reason) == (
        State.STOPPED,
        "the kernel ended the VMM: it exceeded its memory limit of 300 MiB",
    )
    assert groups(tree) == {}


async def test_no_group_is_left_by_a_start_that_failed_or_was_killed(
    fake_host: AsyncHost, make_host: HostFactory, tree: Path
) -> None:
    """Its link in the instance's directory names it, whatever process looks next."""
    vm = await make(fake_host, State.STANDBY)
    directory = fake_host.local.rooms.directory(vm.id)
    group = tree / f"coppice-{vm.id}"
    (directory / limits.LINK).symlink_to(group)
    group.mkdir()
    await fake_host.call(RestoreRequest(instance="oak"))
    assert groups(tree) == {}
    (directory / limits.LINK).symlink_to(tree / "own")  # not a group of this instance
    await fake_host.call(StopRequest(instance="oak"))
    assert (tree / "own").is_dir()
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")


async def test_limits_are_refused_where_the_host_cannot_enforce_them(
    fake_host: AsyncHost, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made, with the reason. Who asks for none needs no control groups."""
    (tree / "cgroup.controllers").write_text("cpu")
    (tree / "own/cgroup.controllers").write_text("cpu")
    with pytest.raises(HostCannot, match="no controller memory"):
        await boot(fake_host, limits=Limits(memory_bytes=300 * MIB))
    with pytest.raises(HostCannot, match="disk"):
        await boot(fake_host, limits=Limits(io_bytes_per_s=MIB))
    vm = await make(fake_host, State.TEMPLATE)
    with pytest.raises(HostCannot, match="no controller pids"):
        await fake_host.call(ForkRequest(instance="oak", limits=Limits(pids=100)))
    monkeypatch.setattr(limits, "ROOT", Path("/nowhere"))
    assert (await fake_host.call(ForkRequest(instance=vm.id, names=["elm"], atomic=True))).succeeded == 1
    await assert_tidy(fake_host, "oak", "elm")


def test_limits_that_no_machine_could_live_in_are_refused() -> None:
    """The message has the bounds."""
    for wrong in (Limits(memory_bytes=1), Limits(cpus=0.0001), Limits(pids=1), Limits(io_bytes_per_s=1)):
        with pytest.raises(UsageError, match="out of bounds"):
            RunRequest(image="x", limits=wrong)
