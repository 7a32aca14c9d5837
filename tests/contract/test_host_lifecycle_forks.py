"""Forks: they share memory by hard link, inherit what the source knew, are themselves at once, and never change their source."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from coppice.errors import IllegalTransition, NameTaken, Refused, UsageError, VmmError
from coppice.host import AsyncHost
from coppice.model import PAGE_SIZE, Instance, Progress, Publish, Sharing, SnapshotKind, State
from coppice.names import MAX_FORKS
from coppice.vmm import driver as files
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.hosting import ask, assert_tidy, boot, fingerprint, make, memory_of, snapshot
from fakes.rooms import DEADLINES, open_rooms

SOURCES = (State.STOPPED, State.STANDBY, State.TEMPLATE)
TARGETS = (State.STOPPED, State.STANDBY, State.RUNNING)


async def warm_source(host: AsyncHost, state: State) -> Instance:
    """A source that knows something in RAM, unless it is Stopped, and something on its disk."""
    await boot(host)
    await ask(host, "oak", "remember", "lesson", "learned")
    await ask(host, "oak", "save", "on disk")
    if state is State.STOPPED:
        return await host.stop("oak")
    source, _ = await host.standby("oak")
    return await host.promote("oak") if state is State.TEMPLATE else source


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("state", SOURCES)
async def test_every_source_to_every_target(fake_host: AsyncHost, state: State, target: State) -> None:
    """With memory where there is some and it is wanted, by disk alone otherwise; and it comes to life as itself, knowing what it should."""
    host = fake_host
    source = await warm_source(host, state)
    if (state, target) == (State.STOPPED, State.STANDBY):
        before = snapshot(host)
        with pytest.raises(IllegalTransition, match="no memory"):
            await host.fork("oak", target=target)
        assert snapshot(host) == before
        return
    report = await host.fork("oak", names=["elm"], target=target)
    (result,) = report.results
    elm = result.instance
    assert elm is not None
    assert (result.ok, elm.state, elm.parent, elm.parent_name) == (True, target, source.id, "oak")
    with_memory = state is not State.STOPPED and target is not State.STOPPED
    assert memory_of(host, elm).exists() == with_memory
    assert (elm.captured_at is not None) == with_memory
    assert result.sharing == (Sharing.HARDLINK if with_memory else Sharing.OWN if target is State.RUNNING else None)
    await assert_tidy(host, "oak", "elm")
    if target is State.STOPPED:
        await host.start("elm")
    elif target is State.STANDBY:
        await host.restore("elm")
    assert await ask(host, "elm", "hostname") == "elm"
    assert await ask(host, "elm", "load") == "on disk"
    assert (await host.exec("elm", ["recall", "lesson"])).stdout == (b"learned\n" if with_memory else b"")


async def test_links_are_counted_and_given_back(fake_host: AsyncHost) -> None:
    """Each fork is one link more on the source's inode, each removal one less; no byte of memory is copied."""
    source = await make(fake_host, State.TEMPLATE)
    memory = memory_of(fake_host, source)
    assert memory.stat().st_nlink == 1
    report = await fake_host.fork("oak", count=4)
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
        await fake_host.rm(fork)
        assert memory.stat().st_nlink == 1 + left
    await assert_tidy(fake_host, "oak")


async def test_what_a_fork_writes_is_its_own(fake_host: AsyncHost) -> None:
    """Pages that one fork dirties cost that fork alone, and show up in nobody else's memory or disk."""
    await warm_source(fake_host, State.TEMPLATE)
    await fake_host.fork("oak", names=["elm", "fir"], count=2)
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
    """Inode, mode, time and SHA-256 of its mem-file stay while forks run, write, are captured, restored, stopped and removed."""
    source = await warm_source(fake_host, State.TEMPLATE)
    memory = memory_of(fake_host, source)
    before = fingerprint(memory)
    assert before[1] & 0o777 == 0o444
    await fake_host.fork("oak", names=["elm", "fir"], count=2)
    await ask(fake_host, "elm", "dirty", "50")
    elm, _ = await fake_host.standby("elm")
    assert memory_of(fake_host, elm).stat().st_ino != before[0]
    assert (elm.mem_file.sharing if elm.mem_file else None) is Sharing.OWN
    await fake_host.restore("elm")
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    await fake_host.stop("fir")
    await fake_host.rm("elm")
    await fake_host.rm("fir")
    assert fingerprint(memory) == before


async def test_a_source_may_go_before_its_forks(fake_host: AsyncHost) -> None:
    """A fork owns what it maps: it runs, and can be captured and restored, when its source is gone."""
    await warm_source(fake_host, State.STANDBY)
    await fake_host.fork("oak", names=["elm"])
    await fake_host.fork("oak", names=["fir"], target=State.STANDBY)
    await fake_host.rm("oak")
    await assert_tidy(fake_host, "elm", "fir")
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    await fake_host.standby("elm")
    for name in ("elm", "fir"):
        await fake_host.restore(name)
        assert await ask(fake_host, name, "recall", "lesson") == "learned"
    roots = await fake_host.tree()
    assert sorted((root.instance.name, root.instance.parent_name) for root in roots) == [("elm", "oak"), ("fir", "oak")]


async def test_a_source_may_be_captured_anew_under_its_forks(fake_host: AsyncHost) -> None:
    """A capture always makes a new file: forks of the old one keep it, forks of the new one have the new."""
    await warm_source(fake_host, State.STANDBY)
    (elm,) = (await fake_host.fork("oak", names=["elm"], target=State.STANDBY)).instances
    before = fingerprint(memory_of(fake_host, elm))
    await fake_host.restore("oak")
    await ask(fake_host, "oak", "remember", "lesson", "revised")
    oak, _ = await fake_host.standby("oak")
    assert memory_of(fake_host, oak).stat().st_ino != before[0]
    assert fingerprint(memory_of(fake_host, elm)) == before
    await fake_host.fork("oak", names=["fir"])
    await fake_host.restore("elm")
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    assert await ask(fake_host, "fir", "recall", "lesson") == "revised"


async def test_forks_are_themselves(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Hostname, machine-id, boot-id, MAC and entropy differ among all; serials grow along the lineage; the source's sessions are ended."""
    source = await boot(fake_host)
    known = [driver.guest_state(fake_host.rooms.directory(source.id))]
    await fake_host.standby("oak")
    report = await fake_host.fork("oak", count=3)
    for instance in report.instances:
        state = driver.guest_state(fake_host.rooms.directory(instance.id))
        assert state.hostname == instance.name == instance.hostname
        assert state.serial > known[0].serial
        assert state.sessions_ended == 1
        known.append(state)
    for field in ("hostname", "machine_id", "mac", "entropy"):
        assert len({getattr(state, field) for state in known}) == 4, field
    assert len({state.boot_id for state in known[1:]}) == 3


async def test_a_restore_is_no_new_machine(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The same machine after a standby: fresh entropy and a new serial, but its own machine-id, boot-id, MAC and name."""
    vm = await make(fake_host, State.STANDBY)
    (elm,) = (await fake_host.fork("oak", names=["elm"])).instances
    for instance in (vm, elm):
        if instance is vm:
            await fake_host.restore(vm)
        directory = fake_host.rooms.directory(instance.id)
        before = driver.guest_state(directory)
        await fake_host.standby(instance)
        await fake_host.restore(instance)
        after = driver.guest_state(directory)
        assert after.entropy != before.entropy
        assert after.serial > before.serial
        for field in ("hostname", "machine_id", "boot_id", "mac"):
            assert getattr(after, field) == getattr(before, field), field


async def test_one_that_fails_does_not_touch_its_siblings(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """All settle, each with its own outcome; what failed left nothing, what succeeded runs."""
    await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at("restore", nth=2)
    driver.faults.die_at("identity", nth=3)
    seen: list[Progress] = []
    report = await fake_host.fork("oak", count=5, names=["elm"], progress=seen.append)
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
async def test_all_or_nothing(fake_host: AsyncHost, driver: FakeDriver, step: str) -> None:
    """With `atomic` one failure undoes every sibling, also those that ran already, and is raised."""
    await make(fake_host, State.TEMPLATE)
    driver.faults.fail_at(step, nth=4)
    with pytest.raises((VmmError, Exception), match="planned"):
        await fake_host.fork("oak", count=4, atomic=True)
    await assert_tidy(fake_host, "oak")
    assert (await fake_host.inspect("oak")).fork_count == 0
    assert (await fake_host.fork("oak", count=4, atomic=True)).succeeded == 4


async def test_a_taken_name_makes_no_child(fake_host: AsyncHost) -> None:
    """Names are taken in one transaction, before the first side effect."""
    await make(fake_host, State.TEMPLATE)
    await fake_host.fork("oak", names=["elm"], target=State.STOPPED)
    before = snapshot(fake_host)
    with pytest.raises(NameTaken, match="elm"):
        await fake_host.fork("oak", count=3, names=["ash", "elm", "fir"])
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
async def test_a_request_that_can_never_be_makes_nothing(fake_host: AsyncHost, options: dict[str, object]) -> None:
    """Refused as usage, whatever state the source is in."""
    await make(fake_host, State.TEMPLATE)
    before = snapshot(fake_host)
    with pytest.raises(UsageError):
        await fake_host.fork("oak", **options)  # type: ignore[arg-type]  # the options of all cases together
    assert snapshot(fake_host) == before


async def test_a_caller_without_types_gets_what_it_means(fake_host: AsyncHost) -> None:
    """A target by its name is that target, not a machine that is called Running and is none; one name is not a list of letters."""
    await make(fake_host, State.STANDBY)
    report = await fake_host.fork("oak", names="elm", target=State("Running").value)  # type: ignore[arg-type]
    assert [(fork.name, fork.state) for fork in report.instances] == [("elm", State.RUNNING)]
    with pytest.raises(UsageError, match="one string"):
        await fake_host.exec("elm", "echo")
    await assert_tidy(fake_host, "oak", "elm")


async def test_a_link_that_cannot_be_made_is_a_copy_that_says_why(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Too many links: the fork copies, runs all the same, and report and log name the reason."""
    source = await make(fake_host, State.TEMPLATE)
    real = os.link

    def refuse(src: Path, dst: Path, **options: bool) -> None:
        if Path(src).name == files.MEMORY:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        real(src, dst, **options)

    monkeypatch.setattr(os, "link", refuse)
    (result,) = (await fake_host.fork("oak", names=["elm"])).results
    assert result.instance is not None
    assert result.sharing is Sharing.COPY
    assert "hard links" in result.sharing_reason
    assert any("elm" in record.getMessage() and "hard links" in record.getMessage() for record in caplog.records)
    assert memory_of(fake_host, result.instance).stat().st_ino != memory_of(fake_host, source).stat().st_ino
    assert await ask(fake_host, "elm", "hostname") == "elm"
    await fake_host.standby("elm")
    await assert_tidy(fake_host, "oak", "elm")


async def test_a_driver_without_private_mapping_gets_copies(fake_vmm: Path, fake_home: Path) -> None:
    """A capability decides, not a name: such a driver might write into the mem-file, so no fork gets a link to it."""
    capabilities = msgspec.structs.replace(CAPABILITIES, maps_mem_file_privately=False)
    driver = FakeDriver(fake_vmm, capabilities=capabilities)
    async with AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        source = await make(host, State.TEMPLATE)
        (result,) = (await host.fork("oak")).results
        assert result.sharing is Sharing.COPY
        assert "privately" in result.sharing_reason
        assert memory_of(host, source).stat().st_nlink == 1
    await driver.end(fake_home / "instances")


async def test_a_driver_that_copies_in_silence_is_seen(fake_vmm: Path, fake_home: Path) -> None:
    """Sharing is read from the kernel: the link is there, but the VMM maps other memory, and the report says so."""
    driver = FakeDriver(fake_vmm, copies_silently=True)
    async with AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        source = await make(host, State.TEMPLATE)
        (result,) = (await host.fork("oak")).results
        assert result.ok
        assert result.sharing is Sharing.COPY
        assert result.memory is not None
        assert result.memory.unique_bytes >= source.machine.memory_bytes
    await driver.end(fake_home / "instances")


async def test_a_fork_of_another_host_is_refused(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A vmstate is loaded only where it was saved: the error names the difference, and nothing is left of the fork."""
    await make(fake_host, State.TEMPLATE)
    driver.vmm_version = "2"
    (result,) = (await fake_host.fork("oak")).results
    assert result.error_code == "integrity_error"
    assert "vmm version was 1, is 2" in (result.error or "")
    assert driver.faults.reached["restore"] == 0
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("state", [State.TEMPLATE, State.STANDBY])
async def test_the_disk_of_what_another_host_captured_is_kept(
    fake_host: AsyncHost, driver: FakeDriver, state: State
) -> None:
    """The way out that the refusal names is one: a fork of the disk alone boots here, and can be captured anew."""
    await make(fake_host, state)
    driver.vmm_version = "2"
    (result,) = (await fake_host.fork("oak")).results
    assert "`coppice fork NAME --target stopped`" in (result.error or "")
    (kept,) = (await fake_host.fork("oak", names=["elm"], target=State.STOPPED, atomic=True)).instances
    assert (await fake_host.start(kept)).state is State.RUNNING
    await fake_host.standby(kept)
    assert (await fake_host.restore(kept)).state is State.RUNNING
    assert (await fake_host.get("oak")).state is state
    await assert_tidy(fake_host, "oak", "elm")


@pytest.mark.parametrize("operation", ["standby", "fork", "snapshot"])
async def test_nothing_is_captured_that_could_not_be_loaded(
    fake_host: AsyncHost, driver: FakeDriver, operation: str
) -> None:
    """The VMM was updated under a machine that runs: its memory is not given up for a capture that is of no use; the disk alone can be kept."""
    source = await make(fake_host, State.RUNNING)
    driver.vmm_version = "2"
    captures: dict[str, Callable[[], Awaitable[object]]] = {
        "standby": lambda: fake_host.standby("oak"),
        "fork": lambda: fake_host.fork("oak", from_running=True),
        "snapshot": lambda: fake_host.snapshot_create("oak", name="leaf"),
    }
    with pytest.raises(Refused, match="vmm version was 1, is 2"):
        await captures[operation]()
    assert (await fake_host.get("oak")).vmm == source.vmm
    assert driver.faults.reached["pause"] == 0
    await assert_tidy(fake_host, "oak")
    await fake_host.snapshot_create("oak", name="leaf", kind=SnapshotKind.STOPPED)
    await fake_host.snapshot_rm("leaf")
    await fake_host.stop("oak")
    await fake_host.start("oak")
    await fake_host.standby("oak")
    await assert_tidy(fake_host, "oak")


async def test_a_mem_file_that_was_written_to_is_refused(fake_host: AsyncHost) -> None:
    """Neither forked nor restored: a captured mem-file that can be written, or is another file, is not what was captured."""
    source = await make(fake_host, State.STANDBY)
    memory = memory_of(fake_host, source)
    memory.chmod(0o644)
    (result,) = (await fake_host.fork("oak")).results
    assert result.error_code == "integrity_error"
    memory.chmod(0o444)
    copy = memory.with_name("copy")
    copy.write_bytes(memory.read_bytes())
    copy.chmod(0o444)
    copy.rename(memory)
    (result,) = (await fake_host.fork("oak")).results
    assert result.error_code == "integrity_error"
    assert "inode" in (result.error or "")
    await assert_tidy(fake_host, "oak")


async def test_a_hundred_forks_at_once(fake_host: AsyncHost) -> None:
    """One call, one memory: a hundred links to one inode, and all of them go again."""
    source = await make(fake_host, State.TEMPLATE)
    report = await fake_host.fork("oak", count=100, target=State.STANDBY)
    assert report.succeeded == 100
    assert memory_of(fake_host, source).stat().st_nlink == 101
    assert len(await fake_host.ls(state=State.STANDBY)) == 100
    await asyncio.gather(*(fake_host.rm(fork) for fork in report.instances))
    await assert_tidy(fake_host, "oak")
