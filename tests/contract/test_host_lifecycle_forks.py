"""Forks share memory by hard link, inherit what the source knew, have their own identity at once,
and never change their source.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import IllegalTransition, NameTaken, Refused, UsageError, VmmError
from coppice.model import PAGE_SIZE, Instance, Progress, Publish, Sharing, SnapshotKind, State
from coppice.names import MAX_FORKS
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    InspectRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.vmm import driver as files
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.hosting import ask, assert_tidy, boot, fingerprint, make, memory_of, newest_memory_of, snapshot
from fakes.rooms import DEADLINES, open_rooms

SOURCES = (State.STOPPED, State.STANDBY, State.TEMPLATE)
TARGETS = (State.STOPPED, State.STANDBY, State.RUNNING)


async def warm_source(host: AsyncHost, state: State) -> Instance:
    """Make a source that remembers something on its disk and, unless Stopped, in RAM."""
    await boot(host)
    await ask(host, "oak", "remember", "lesson", "learned")
    await ask(host, "oak", "save", "on disk")
    if state is State.STOPPED:
        return await host.call(StopRequest(instance="oak"))
    source = (await host.call(StandbyRequest(instance="oak"))).instance
    return await host.call(PromoteRequest(instance="oak")) if state is State.TEMPLATE else source


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("state", SOURCES)
async def test_every_source_to_every_target(fake_host: AsyncHost, state: State, target: State) -> None:
    """A fork keeps the memory if the source has some and the target wants it, else the disk alone.

    It answers under its own name.
    """
    host = fake_host
    source = await warm_source(host, state)
    if (state, target) == (State.STOPPED, State.STANDBY):
        before = snapshot(host)
        with pytest.raises(IllegalTransition, match="no memory"):
            await host.call(ForkRequest(instance="oak", target=target))
        assert snapshot(host) == before
        return
    report = await host.call(ForkRequest(instance="oak", names=["elm"], target=target))
    (result,) = report.results
    elm = result.instance
    assert elm is not None
    assert (result.ok, elm.state, elm.parent, elm.parent_name) == (True, target, source.id, "oak")
    with_memory = state is not State.STOPPED and target is not State.STOPPED
    assert memory_of(host, elm).exists() == with_memory
    assert (elm.capture is not None) == with_memory
    assert result.sharing == (Sharing.HARDLINK if with_memory else Sharing.OWN if target is State.RUNNING else None)
    await assert_tidy(host, "oak", "elm")
    if target is State.STOPPED:
        await host.call(StartRequest(instance="elm"))
    elif target is State.STANDBY:
        await host.call(RestoreRequest(instance="elm"))
    assert await ask(host, "elm", "hostname") == "elm"
    assert await ask(host, "elm", "load") == "on disk"
    assert (await host.call(ExecRequest(instance="elm", argv=["recall", "lesson"]))).stdout == (
        b"learned\n" if with_memory else b""
    )


async def test_each_fork_is_one_link_to_the_memory(fake_host: AsyncHost) -> None:
    """Each fork adds one link, each removal takes one away, and no memory is copied."""
    source = await make(fake_host, State.TEMPLATE)
    memory = memory_of(fake_host, source)
    assert memory.stat().st_nlink == 1
    report = await fake_host.call(ForkRequest(instance="oak", count=4, measure=True))
    assert report.succeeded == 4
    assert memory.stat().st_nlink == 5
    for result in report.results:
        assert result.instance is not None
        assert result.memory is not None
        assert memory_of(fake_host, result.instance).stat().st_ino == memory.stat().st_ino == result.memory.inode
        assert result.sharing is Sharing.HARDLINK
        assert result.memory.unique_bytes <= 4 * PAGE_SIZE
        assert result.memory.shared_bytes >= PAGE_SIZE
        assert result.disk_bytes_written < 1 << 20
    for left, fork in zip((3, 2, 1, 0), report.instances, strict=True):
        await fake_host.call(RmRequest(instance=fork.id))
        assert memory.stat().st_nlink == 1 + left
    await assert_tidy(fake_host, "oak")


async def test_writes_of_a_fork_stay_in_that_fork(fake_host: AsyncHost) -> None:
    """Pages that a fork dirties cost that fork alone, and appear in no other memory or disk."""
    await warm_source(fake_host, State.TEMPLATE)
    await fake_host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2))
    before = await fake_host.stats()
    await ask(fake_host, "elm", "dirty", "100")
    await ask(fake_host, "elm", "remember", "lesson", "forgotten")
    await ask(fake_host, "elm", "save", "of elm")
    after = await fake_host.stats()
    assert after["elm"].unique_bytes - before["elm"].unique_bytes >= 100 * PAGE_SIZE
    assert after["fir"].unique_bytes == before["fir"].unique_bytes
    assert await ask(fake_host, "fir", "recall", "lesson") == "learned"
    assert await ask(fake_host, "fir", "load") == "on disk"


async def test_the_source_never_changes(fake_host: AsyncHost) -> None:
    """The mem-file keeps its inode, mode, time and SHA-256 while forks run, write, are captured,
    restored, stopped and removed.
    """
    source = await warm_source(fake_host, State.TEMPLATE)
    memory = memory_of(fake_host, source)
    before = fingerprint(memory)
    assert before[1] & 0o777 == 0o444
    await fake_host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2))
    await ask(fake_host, "elm", "dirty", "50")
    elm = (await fake_host.call(StandbyRequest(instance="elm"))).instance
    assert newest_memory_of(fake_host, elm).stat().st_ino != before[0]
    assert elm.capture
    assert [layer.sharing for layer in elm.capture.layers] == [Sharing.OWN]
    await fake_host.call(RestoreRequest(instance="elm"))
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    await fake_host.call(StopRequest(instance="fir"))
    await fake_host.call(RmRequest(instance="elm"))
    await fake_host.call(RmRequest(instance="fir"))
    assert fingerprint(memory) == before


async def test_a_source_can_be_removed_before_its_forks(fake_host: AsyncHost) -> None:
    """A fork owns what it maps: without its source it runs, and can be captured and restored."""
    await warm_source(fake_host, State.STANDBY)
    await fake_host.call(ForkRequest(instance="oak", names=["elm"]))
    await fake_host.call(ForkRequest(instance="oak", names=["fir"], target=State.STANDBY))
    await fake_host.call(RmRequest(instance="oak"))
    await assert_tidy(fake_host, "elm", "fir")
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    await fake_host.call(StandbyRequest(instance="elm"))
    for name in ("elm", "fir"):
        await fake_host.call(RestoreRequest(instance=name))
        assert await ask(fake_host, name, "recall", "lesson") == "learned"
    roots = await fake_host.tree()
    assert sorted((root.instance.name, root.instance.parent_name) for root in roots) == [("elm", "oak"), ("fir", "oak")]


async def test_a_new_capture_of_the_source_leaves_its_forks_alone(fake_host: AsyncHost) -> None:
    """A capture makes a new file: earlier forks keep the old one, later ones get the new."""
    await warm_source(fake_host, State.STANDBY)
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STANDBY))).instances
    before = fingerprint(memory_of(fake_host, elm))
    await fake_host.call(RestoreRequest(instance="oak"))
    await ask(fake_host, "oak", "remember", "lesson", "revised")
    oak = (await fake_host.call(StandbyRequest(instance="oak"))).instance
    assert newest_memory_of(fake_host, oak).stat().st_ino != before[0]
    assert fingerprint(memory_of(fake_host, elm)) == before
    await fake_host.call(ForkRequest(instance="oak", names=["fir"]))
    await fake_host.call(RestoreRequest(instance="elm"))
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    assert await ask(fake_host, "fir", "recall", "lesson") == "revised"


async def test_forks_have_their_own_identity(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Hostname, machine-id, boot-id, MAC and entropy differ between all forks and their source.

    Serials grow along the lineage, and the source's sessions are ended.
    """
    source = await boot(fake_host)
    known = [driver.guest_state(fake_host.local.rooms.directory(source.id))]
    await fake_host.call(StandbyRequest(instance="oak"))
    report = await fake_host.call(ForkRequest(instance="oak", count=3))
    for instance in report.instances:
        state = driver.guest_state(fake_host.local.rooms.directory(instance.id))
        assert state.hostname == instance.name == instance.hostname
        assert state.serial > known[0].serial
        assert state.sessions_ended == 1
        known.append(state)
    for field in ("hostname", "machine_id", "mac", "entropy"):
        assert len({getattr(state, field) for state in known}) == 4, field
    assert len({state.boot_id for state in known[1:]}) == 3


async def test_a_restore_keeps_the_identity(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A restore gives fresh entropy and a new serial; machine-id, boot-id, MAC and name stay."""
    vm = await make(fake_host, State.STANDBY)
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"]))).instances
    for instance in (vm, elm):
        if instance is vm:
            await fake_host.call(RestoreRequest(instance=vm.id))
        directory = fake_host.local.rooms.directory(instance.id)
        before = driver.guest_state(directory)
        await fake_host.call(StandbyRequest(instance=instance.id))
        await fake_host.call(RestoreRequest(instance=instance.id))
        after = driver.guest_state(directory)
        assert after.entropy != before.entropy
        assert after.serial > before.serial
        for field in ("hostname", "machine_id", "boot_id", "mac"):
            assert getattr(after, field) == getattr(before, field), field


async def test_a_failed_fork_does_not_affect_its_siblings(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Each fork has its own outcome: a failed one leaves nothing, and the others run."""
    await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at("restore", nth=2)
    driver.faults.die_at("identity", nth=3)
    seen: list[Progress] = []
    report = await fake_host.call(ForkRequest(instance="oak", count=5, names=["elm"]), seen.append)
    assert [result.name for result in report.results] == [f"elm-{n}" for n in range(1, 6)]
    assert (report.count, report.succeeded, len(report.instances)) == (5, 3, 3)
    failed = [result for result in report.results if not result.ok]
    assert {result.error_code for result in failed} <= {"vmm_error", "vmm_died"}
    assert all(result.error and result.instance is None for result in failed)
    assert [(step.done, step.total) for step in seen] == [(n, 5) for n in range(1, 6)]
    await assert_tidy(fake_host, "oak", *(fork.name for fork in report.instances))
    for fork in report.instances:
        assert await ask(fake_host, fork, "hostname") == fork.name


@pytest.mark.parametrize("step", ["restore", "restored", "identity", "manifest"])
async def test_an_atomic_fan_out_makes_all_forks_or_none(fake_host: AsyncHost, driver: FakeDriver, step: str) -> None:
    """With `atomic`, one failure is raised and removes every sibling, also running ones."""
    await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at(step, nth=4)
    with pytest.raises((VmmError, Exception), match="planned"):
        await fake_host.call(ForkRequest(instance="oak", count=4, atomic=True))
    await assert_tidy(fake_host, "oak")
    assert (await fake_host.call(InspectRequest(instance="oak"))).fork_count == 0
    assert (await fake_host.call(ForkRequest(instance="oak", count=4, atomic=True))).succeeded == 4


async def test_a_taken_name_makes_no_child(fake_host: AsyncHost) -> None:
    """Names are taken in one transaction, before the first side effect."""
    await make(fake_host, State.TEMPLATE)
    await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STOPPED))
    before = snapshot(fake_host)
    with pytest.raises(NameTaken, match="elm"):
        await fake_host.call(ForkRequest(instance="oak", count=3, names=["ash", "elm", "fir"]))
    assert snapshot(fake_host) == before


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0},
        {"count": MAX_FORKS + 1},
        {"count": 2, "names": ["a", "b", "c"]},
        {"count": 2, "names": ["a", "a"]},
        {"names": ["A"]},
        {"names": ["a" * 62], "count": 10},
        {"target": State.TEMPLATE},
        {"target": State.PAUSED},
        {"count": 2, "publish": [Publish(host_port=80, guest_port=80)]},
        {"tags": {"": ""}},
    ],
    ids=str,
)
async def test_an_invalid_fork_request_makes_nothing(fake_host: AsyncHost, options: dict[str, object]) -> None:
    """An invalid request is a UsageError in any state of the source."""
    await make(fake_host, State.TEMPLATE)
    before = snapshot(fake_host)
    with pytest.raises(UsageError):
        await fake_host.call(ForkRequest(instance="oak", **options))  # type: ignore[arg-type]  # the options of all cases together
    assert snapshot(fake_host) == before


async def test_plain_strings_are_converted_or_refused(fake_host: AsyncHost) -> None:
    """The name of a state is accepted as a target, so the fork really runs.

    A string is not accepted as a list of strings.
    """
    await make(fake_host, State.STANDBY)
    report = await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State("Running").value))  # type: ignore[arg-type]
    assert [(fork.name, fork.state) for fork in report.instances] == [("elm", State.RUNNING)]
    with pytest.raises(UsageError, match="must be list, not str"):
        ForkRequest(instance="oak", names="fir")
    with pytest.raises(UsageError, match="must be list, not str"):
        ExecRequest(instance="elm", argv="echo")
    await assert_tidy(fake_host, "oak", "elm")


async def test_a_fork_without_a_link_copies_and_says_why(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the file has too many links, the fork copies the memory and runs, and the report and the
    log name the reason.
    """
    source = await make(fake_host, State.TEMPLATE)
    real = os.link

    def refuse(src: Path, dst: Path, **options: bool) -> None:
        if Path(src).name == files.MEMORY:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        real(src, dst, **options)

    monkeypatch.setattr(os, "link", refuse)
    (result,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"]))).results
    assert result.instance is not None
    assert result.sharing is Sharing.COPY
    assert "hard links" in result.sharing_reason
    assert any("elm" in record.getMessage() and "hard links" in record.getMessage() for record in caplog.records)
    assert memory_of(fake_host, result.instance).stat().st_ino != memory_of(fake_host, source).stat().st_ino
    assert await ask(fake_host, "elm", "hostname") == "elm"
    await fake_host.call(StandbyRequest(instance="elm"))
    await assert_tidy(fake_host, "oak", "elm")


async def test_a_driver_without_private_mapping_gets_copies(fake_vmm: Path, fake_home: Path) -> None:
    """A driver that declares no private mapping might write to the mem-file, so its forks get
    copies instead of links.
    """
    capabilities = msgspec.structs.replace(CAPABILITIES, maps_mem_file_privately=False)
    driver = FakeDriver(fake_vmm, capabilities=capabilities)
    async with AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        source = await make(host, State.TEMPLATE)
        (result,) = (await host.call(ForkRequest(instance="oak"))).results
        assert result.sharing is Sharing.COPY
        assert "privately" in result.sharing_reason
        assert memory_of(host, source).stat().st_nlink == 1
    await driver.end(fake_home / "instances")


@pytest.mark.parametrize("measure", [False, True])
async def test_a_driver_that_copies_silently_is_reported(fake_vmm: Path, fake_home: Path, measure: bool) -> None:
    """Sharing is read from the kernel: the link exists, but the VMM maps other memory, and the
    report says so.
    """
    driver = FakeDriver(fake_vmm, copies_silently=True)
    async with AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        source = await make(host, State.TEMPLATE)
        (result,) = (await host.call(ForkRequest(instance="oak", measure=measure))).results
        assert result.ok
        assert result.sharing is Sharing.COPY
        assert (result.memory is not None) == measure
        assert result.memory is None or result.memory.unique_bytes >= source.machine.memory_bytes
    await driver.end(fake_home / "instances")


async def test_a_capture_of_another_vmm_version_is_refused(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A vmstate is loaded only on a host like that which saved it.

    The error names the difference, and nothing of the fork is left.
    """
    await make(fake_host, State.TEMPLATE)
    driver.vmm_version = "2"
    (result,) = (await fake_host.call(ForkRequest(instance="oak"))).results
    assert result.error_code == "integrity_error"
    assert "vmm version was 1, is 2" in (result.error or "")
    assert driver.faults.reached["restore"] == 0
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("state", [State.TEMPLATE, State.STANDBY])
async def test_the_disk_of_an_unloadable_capture_can_be_forked(
    fake_host: AsyncHost, driver: FakeDriver, state: State
) -> None:
    """The refusal's hint works: a fork of the disk alone boots and can be captured."""
    await make(fake_host, state)
    driver.vmm_version = "2"
    (result,) = (await fake_host.call(ForkRequest(instance="oak"))).results
    assert "`coppice fork NAME --target stopped`" in (result.error or "")
    (kept,) = (
        await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STOPPED, atomic=True))
    ).instances
    assert (await fake_host.call(StartRequest(instance=kept.id))).state is State.RUNNING
    await fake_host.call(StandbyRequest(instance=kept.id))
    assert (await fake_host.call(RestoreRequest(instance=kept.id))).state is State.RUNNING
    assert (await fake_host.call(GetRequest(instance="oak"))).state is state
    await assert_tidy(fake_host, "oak", "elm")


@pytest.mark.parametrize("operation", ["standby", "fork", "snapshot"])
async def test_a_capture_that_could_not_be_loaded_is_refused(
    fake_host: AsyncHost, driver: FakeDriver, operation: str
) -> None:
    """A guest whose VMM was updated on the host runs on; a disk-only snapshot of it works."""
    source = await make(fake_host, State.RUNNING)
    driver.vmm_version = "2"
    captures: dict[str, Callable[[], Awaitable[object]]] = {
        "standby": lambda: fake_host.call(StandbyRequest(instance="oak")),
        "fork": lambda: fake_host.call(ForkRequest(instance="oak", from_running=True)),
        "snapshot": lambda: fake_host.call(SnapshotRequest(instance="oak", name="leaf")),
    }
    with pytest.raises(Refused, match="vmm version was 1, is 2"):
        await captures[operation]()
    assert (await fake_host.call(GetRequest(instance="oak"))).vmm == source.vmm
    assert driver.faults.reached["pause"] == 0
    await assert_tidy(fake_host, "oak")
    await fake_host.call(SnapshotRequest(instance="oak", name="leaf", kind=SnapshotKind.STOPPED))
    await fake_host.snapshots.rm("leaf")
    await fake_host.call(StopRequest(instance="oak"))
    await fake_host.call(StartRequest(instance="oak"))
    await fake_host.call(StandbyRequest(instance="oak"))
    await assert_tidy(fake_host, "oak")


async def test_a_changed_mem_file_is_refused(fake_host: AsyncHost) -> None:
    """A mem-file that is writable, or is another file than the captured one, cannot be forked."""
    source = await make(fake_host, State.STANDBY)
    memory = memory_of(fake_host, source)
    memory.chmod(0o644)
    (result,) = (await fake_host.call(ForkRequest(instance="oak"))).results
    assert result.error_code == "integrity_error"
    memory.chmod(0o444)
    copy = memory.with_name("copy")
    copy.write_bytes(memory.read_bytes())
    copy.chmod(0o444)
    copy.rename(memory)
    (result,) = (await fake_host.call(ForkRequest(instance="oak"))).results
    assert result.error_code == "integrity_error"
    assert "inode" in (result.error or "")
    await assert_tidy(fake_host, "oak")


async def test_a_hundred_forks_at_once(fake_host: AsyncHost) -> None:
    """One call makes a hundred links to one inode, and removing the forks removes them all."""
    source = await make(fake_host, State.TEMPLATE)
    report = await fake_host.call(ForkRequest(instance="oak", count=100, target=State.STANDBY))
    assert report.succeeded == 100
    assert memory_of(fake_host, source).stat().st_nlink == 101
    assert len(await fake_host.call(LsRequest(state=State.STANDBY))) == 100
    await asyncio.gather(*(fake_host.call(RmRequest(instance=fork.id)) for fork in report.instances))
    await assert_tidy(fake_host, "oak")
