"""Snapshots keep a moment without their source or forks, and can take an instance back to it.

A failure or a cancellation leaves nothing half-made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from coppice.client import AsyncHost
from coppice.errors import HostCannot, IllegalTransition, InUse, InvalidName, NameTaken, NotFound, UsageError, VmmError
from coppice.linux.maps import FileIdentity
from coppice.machine import live
from coppice.model import Instance, SnapshotKind, State
from coppice.requests import (
    ExecRequest,
    GetRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotInspectRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    SnapshotRmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.state.journal import JournalOperation
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, cancelled_at, fingerprint, make, memory_of, snapshot
from fakes.rooms import IMAGE

KEPT = "kept"
_MOST_WAITS = 400
STANDBY, STOPPED = SnapshotKind.STANDBY, SnapshotKind.STOPPED


async def warm(host: AsyncHost, state: State, *, private: bool = False) -> Instance:
    """Make an instance that knows `first`; if `private`, it was restored once."""
    oak = await boot(host)
    if private:
        await host.call(StandbyRequest(instance="oak"))
        oak = await host.call(RestoreRequest(instance="oak"))
    await learn(host, "first")
    if state is State.STOPPED:
        return await host.call(StopRequest(instance="oak"))
    if state is not State.RUNNING:
        oak = (await host.call(StandbyRequest(instance="oak"))).instance
    return await host.call(PromoteRequest(instance="oak")) if state is State.TEMPLATE else oak


async def learn(host: AsyncHost, lesson: str, name: str = "oak") -> None:
    """Store the lesson in memory and on disk."""
    await ask(host, name, "remember", "lesson", lesson)
    await ask(host, name, "save", lesson)


async def knows(host: AsyncHost, name: str) -> tuple[str, str]:
    """Return the lesson in a running machine's memory and the lesson on its disk."""
    result = await host.call(ExecRequest(instance=name, argv=["recall", "lesson"]))
    return result.stdout.decode().strip(), await ask(host, name, "load")


@pytest.mark.parametrize("kind", [None, STANDBY, STOPPED])
@pytest.mark.parametrize(
    ("state", "private"),
    [
        (State.STOPPED, False), (State.STANDBY, False), (State.TEMPLATE, False), (State.RUNNING, False), (State.RUNNING, True),
    ],
)  # fmt: skip
async def test_a_snapshot_outlives_its_source(
    fake_host: AsyncHost, state: State, private: bool, kind: SnapshotKind | None
) -> None:
    """Forks of a snapshot know what the source knew at that moment, even after the source changed
    and was removed.
    """
    host = fake_host
    source = await warm(host, state, private=private)
    if (state, kind) == (State.STOPPED, STANDBY):
        before = snapshot(host)
        with pytest.raises(IllegalTransition, match="no memory"):
            await host.call(SnapshotRequest(instance="oak", kind=kind))
        assert snapshot(host) == before
        return
    made = await host.call(SnapshotRequest(instance="oak", name=KEPT, kind=kind, tags={"team": "a"}))
    with_memory = state is not State.STOPPED and kind is not STOPPED
    assert made.kind is (STANDBY if with_memory else STOPPED)
    assert (made.source, made.source_name, made.tags) == (source.id, "oak", {"team": "a"})
    assert (made.mem_file is not None) == with_memory
    assert (made.pause_ms > 0) == (state is State.RUNNING)
    assert made.size_bytes > 0
    (oak,) = await assert_tidy(host, "oak")
    assert oak.state is state
    if state is State.RUNNING:
        assert await knows(host, "oak") == ("first", "first")
        await learn(host, "second")
        assert await knows(host, "oak") == ("second", "second")
    await host.call(RmRequest(instance="oak"))
    report = await host.call(SnapshotForkRequest(snapshot=KEPT, names=["elm", "fir"], count=2))
    assert report.succeeded == 2, report
    for fork in report.instances:
        assert (fork.snapshot, fork.parent, fork.parent_name) == (made.id, None, "oak")
        assert await ask(host, fork, "hostname") == fork.name
        assert await knows(host, fork.name) == ("first" if with_memory else "", "first")
    await assert_tidy(host, "elm", "fir")
    assert (await host.snapshots.inspect(KEPT)).snapshot == made


@pytest.mark.parametrize("private", [False, True], ids=["first boot", "private mapping"])
async def test_a_snapshot_leaves_its_running_source_unchanged(fake_host: AsyncHost, private: bool) -> None:
    """After a snapshot, a running machine can be captured and restored with its memory complete."""
    await warm(fake_host, State.RUNNING, private=private)
    await fake_host.call(SnapshotRequest(instance="oak", name="one"))
    await learn(fake_host, "second")
    await fake_host.call(SnapshotRequest(instance="oak", name="two"))
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await knows(fake_host, "oak") == ("second", "second")
    await fake_host.call(SnapshotForkRequest(snapshot="one", names=["elm"]))
    await fake_host.call(SnapshotForkRequest(snapshot="two", names=["fir"]))
    assert await knows(fake_host, "elm") == ("first", "first")
    assert await knows(fake_host, "fir") == ("second", "second")
    await assert_tidy(fake_host, "oak", "elm", "fir")


async def test_a_snapshot_copies_memory_without_ptrace(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the mapping cannot be changed, a snapshot of a first boot copies the memory, and the
    source keeps its own file.
    """

    def refuse(pid: int, identity: FileIdentity) -> int:
        raise HostCannot("no tracing here", hint="copy")

    monkeypatch.setattr(live, "make_private", refuse)
    await warm(fake_host, State.RUNNING)
    await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    await learn(fake_host, "second")
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.mem_file is None
    await fake_host.call(SnapshotForkRequest(snapshot=KEPT, names=["elm"]))
    assert await knows(fake_host, "elm") == ("first", "first")
    assert await knows(fake_host, "oak") == ("second", "second")


async def test_a_snapshot_shares_memory_and_never_changes(fake_host: AsyncHost) -> None:
    """It is one more link to the source's inode.

    Its files stay the same while its forks write and are captured, and the forks outlive it.
    """
    oak = await warm(fake_host, State.STANDBY)
    memory = memory_of(fake_host, oak)
    made = await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    directory = fake_host.local.rooms.layout.snapshot(made.id)
    assert (directory / files.MEMORY).stat().st_ino == memory.stat().st_ino
    assert memory.stat().st_nlink == 2
    before = [fingerprint(path) for path in sorted(directory.iterdir())]
    assert all(mode & 0o222 == 0 for _, mode, _, _ in before)
    report = await fake_host.call(SnapshotForkRequest(snapshot=KEPT, names=["elm", "fir"], count=2))
    assert memory.stat().st_nlink == 4
    assert [fork.parent for fork in report.instances] == [oak.id] * 2
    await learn(fake_host, "else", "elm")
    await fake_host.call(StandbyRequest(instance="elm"))
    assert [fingerprint(path) for path in sorted(directory.iterdir())] == before
    found = await fake_host.snapshots.inspect(made)
    assert (found.link_count, found.forks, found.source_lives) == (4, ("elm", "fir"), True)
    assert found.memory_bytes > 0
    assert found.disk_bytes > 0
    await fake_host.snapshots.rm(KEPT)
    assert memory.stat().st_nlink == 3  # a layer of the fork that was captured lies over it
    await assert_tidy(fake_host, "oak", "elm", "fir")
    await fake_host.call(RestoreRequest(instance="elm"))
    assert await knows(fake_host, "elm") == ("else", "else")
    assert await knows(fake_host, "fir") == ("first", "first")


async def test_snapshots_are_found_by_name_id_source_and_tag(fake_host: AsyncHost) -> None:
    """Names are unique among snapshots, and validated. An unknown name is NotFound."""
    oak = await make(fake_host, State.STANDBY)
    one = await fake_host.call(
        SnapshotRequest(instance="oak", name="oak", tags={"a": "1"})
    )  # a snapshot may have an instance's name
    two = await fake_host.call(SnapshotRequest(instance="oak", tags={"a": "1", "b": "2"}))
    await make(fake_host, State.STOPPED, "elm")
    three = await fake_host.call(SnapshotRequest(instance="elm", name="three"))
    assert two.name.startswith("oak-")
    before = snapshot(fake_host)
    with pytest.raises(NameTaken, match="'oak'"):
        await fake_host.call(SnapshotRequest(instance="elm", name="oak"))
    with pytest.raises(InvalidName):
        await fake_host.call(SnapshotRequest(instance="elm", name="../x"))
    with pytest.raises(UsageError):
        await fake_host.call(SnapshotRequest(instance="elm", tags={"": ""}))
    for kind in (SnapshotInspectRequest, SnapshotRestoreRequest, SnapshotForkRequest, SnapshotRmRequest):
        with pytest.raises(NotFound, match="no snapshot"):
            await fake_host.call(kind(snapshot="unknown"))
    assert snapshot(fake_host) == before
    assert await fake_host.snapshots.ls() == [one, two, three]
    assert await fake_host.snapshots.ls(source="oak") == await fake_host.snapshots.ls(source=oak.id) == [one, two]
    assert await fake_host.snapshots.ls(source=oak.id, tags={"b": "2"}) == [two]
    assert await fake_host.snapshots.ls(tags={"b": "1"}) == []
    for reference in ("three", three.id, three):
        assert (await fake_host.snapshots.inspect(reference)).snapshot == three
    with pytest.raises(InUse, match="three"):
        await fake_host.images.rm(IMAGE)


async def test_a_stopped_snapshot_has_no_memory_to_fork(fake_host: AsyncHost) -> None:
    """Its fork to Standby is refused, like that of a Stopped instance.

    A fork to Stopped works from both kinds.
    """
    await warm(fake_host, State.STANDBY)
    await fake_host.call(SnapshotRequest(instance="oak", name="disk", kind=STOPPED))
    await fake_host.call(SnapshotRequest(instance="oak", name="both"))
    with pytest.raises(IllegalTransition, match="no memory"):
        await fake_host.call(SnapshotForkRequest(snapshot="disk", target=State.STANDBY))
    for number, name in enumerate(("disk", "both")):
        (fork,) = (
            await fake_host.call(SnapshotForkRequest(snapshot=name, names=[f"elm-{number}"], target=State.STOPPED))
        ).instances
        assert fork.state is State.STOPPED
    await assert_tidy(fake_host, "oak", "elm-0", "elm-1")


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("kind", [STANDBY, STOPPED])
@pytest.mark.parametrize("state", [State.STOPPED, State.STANDBY, State.RUNNING])
async def test_a_restore_goes_back_to_the_snapshot(
    fake_host: AsyncHost, state: State, kind: SnapshotKind, start: bool
) -> None:
    """Memory and disk are those of the snapshot, in every state of the instance, and the restore
    can be repeated.
    """
    host = fake_host
    await warm(host, State.RUNNING)
    made = await host.call(SnapshotRequest(instance="oak", name=KEPT, kind=kind))
    vmm = (await host.call(GetRequest(instance="oak"))).vmm
    for _ in range(2):
        await learn(host, "second")
        if state is State.STOPPED:
            await host.call(StopRequest(instance="oak", grace_s=0))
        elif state is State.STANDBY:
            await host.call(StandbyRequest(instance="oak"))
        oak = await host.call(SnapshotRestoreRequest(snapshot=KEPT, start=start))
        assert oak.snapshot == made.id
        assert (oak.mem_file is not None) == (kind is STANDBY)
        if not start:
            assert oak.state is (State.STANDBY if kind is STANDBY else State.STOPPED)
            await assert_tidy(host, "oak")
            request = RestoreRequest(instance="oak") if kind is STANDBY else StartRequest(instance="oak")
            oak = await host.call(request)
        await assert_tidy(host, "oak")
        assert oak.state is State.RUNNING
        assert oak.vmm != vmm
        assert await ask(host, "oak", "hostname") == "oak"
        assert await knows(host, "oak") == ("first" if kind is STANDBY else "", "first")
    await host.call(StandbyRequest(instance="oak"))
    await host.call(RestoreRequest(instance="oak"))
    assert (await knows(host, "oak"))[1] == "first"


async def test_a_restore_cancelled_at_its_commit_is_finished(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undoing the commit is unsafe: the next host would finish a restore without files."""
    await warm(fake_host, State.RUNNING)
    await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    await learn(fake_host, "second")
    store, loop = fake_host.local.rooms.store, asyncio.get_running_loop()
    begin = store.begin

    def cancelled_commit(instance: Instance, operation: JournalOperation) -> None:
        begin(instance, operation)
        if operation == JournalOperation.SNAPSHOT_RESTORE_COMMIT:
            loop.call_soon_threadsafe(task.cancel)

    monkeypatch.setattr(store, "begin", cancelled_commit)
    task = asyncio.create_task(fake_host.call(SnapshotRestoreRequest(snapshot=KEPT)))
    with pytest.raises(asyncio.CancelledError):
        await task
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY
    monkeypatch.undo()
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await knows(fake_host, "oak") == ("first", "first")


async def test_a_machine_taken_back_keeps_its_identity(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Machine-id, boot-id, MAC and name stay.

    Entropy is fresh, and the serial is larger than any before.
    """
    oak = await warm(fake_host, State.RUNNING)
    directory = fake_host.local.rooms.directory(oak.id)
    before = driver.guest_state(directory)
    await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    for _ in range(2):
        await fake_host.call(StandbyRequest(instance="oak"))
        await fake_host.call(RestoreRequest(instance="oak"))
    serial = driver.guest_state(directory).serial
    await fake_host.call(SnapshotRestoreRequest(snapshot=KEPT, start=True))
    after = driver.guest_state(directory)
    assert after.serial > serial
    assert after.entropy != before.entropy
    for field in ("hostname", "machine_id", "boot_id", "mac"):
        assert getattr(after, field) == getattr(before, field), field


async def test_a_template_and_a_removed_source_cannot_go_back(fake_host: AsyncHost) -> None:
    """The refusal has a hint that works, and nothing changes.

    A template's forks share its memory.
    """
    await warm(fake_host, State.TEMPLATE)
    await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    before = snapshot(fake_host)
    with pytest.raises(IllegalTransition, match="demote"):
        await fake_host.call(SnapshotRestoreRequest(snapshot=KEPT))
    assert snapshot(fake_host) == before
    await fake_host.call(RmRequest(instance="oak"))
    with pytest.raises(NotFound, match="coppice snapshot fork kept"):
        await fake_host.call(SnapshotRestoreRequest(snapshot=KEPT))
    await assert_tidy(fake_host)


async def test_a_truncated_mem_file_of_a_snapshot_is_refused(fake_host: AsyncHost) -> None:
    """Neither a fork nor the instance gets the memory, and the instance runs on."""
    await warm(fake_host, State.RUNNING, private=True)
    made = await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    memory = fake_host.local.rooms.layout.snapshot(made.id) / files.MEMORY
    memory.chmod(0o644)
    with memory.open("r+b") as file:
        file.truncate(1 << 20)
    memory.chmod(0o444)
    with pytest.raises(Exception, match="its size is"):
        await fake_host.call(SnapshotRestoreRequest(snapshot=KEPT))
    report = await fake_host.call(SnapshotForkRequest(snapshot=KEPT))
    assert "its size is" in (report.results[0].error or "")
    await assert_tidy(fake_host, "oak")
    assert await knows(fake_host, "oak") == ("first", "first")


@pytest.mark.parametrize("kind", [STANDBY, STOPPED])
@pytest.mark.parametrize("step", ["pause", "save", "resume", "freeze", "thaw"])
async def test_a_source_runs_on_when_its_snapshot_fails(
    fake_host: AsyncHost, driver: FakeDriver, step: str, kind: SnapshotKind
) -> None:
    """After an error at any step nothing of the snapshot is left, and the guest answers.

    An agent that cannot freeze or thaw the disk is no error.
    """
    await warm(fake_host, State.RUNNING)
    driver.faults.fail_at(step)
    works = step in ("freeze", "thaw") or (step, kind) == ("save", STOPPED)
    if works:
        await fake_host.call(SnapshotRequest(instance="oak", name=KEPT, kind=kind))
    else:
        with pytest.raises(VmmError, match=step):
            await fake_host.call(SnapshotRequest(instance="oak", name=KEPT, kind=kind))
    await assert_tidy(fake_host, "oak")
    assert [found.name for found in await fake_host.snapshots.ls()] == ([KEPT] if works else [])
    assert await knows(fake_host, "oak") == ("first", "first")
    if not works:
        await fake_host.call(SnapshotRequest(instance="oak", name=KEPT, kind=kind))


@pytest.mark.parametrize(
    ("state", "kind"), [(State.STANDBY, STANDBY), (State.RUNNING, STANDBY), (State.RUNNING, STOPPED)]
)
async def test_a_cancelled_snapshot_leaves_nothing(fake_host: AsyncHost, state: State, kind: SnapshotKind) -> None:
    """The snapshot is cancelled at each of its waits in turn, and the source stays as it was."""
    await warm(fake_host, state)
    for nth in range(1, _MOST_WAITS):
        came = await cancelled_at(fake_host.call(SnapshotRequest(instance="oak", name=KEPT, kind=kind)), nth)
        (oak,) = await assert_tidy(fake_host, "oak")
        assert oak.state is state
        if not came:
            break
        assert await fake_host.snapshots.ls() == []
    else:
        pytest.fail("a snapshot waits more often than this test cancels")
    assert nth > 5
    assert [found.name for found in await fake_host.snapshots.ls()] == [KEPT]
    if state is State.RUNNING:
        assert await knows(fake_host, "oak") == ("first", "first")


@pytest.mark.parametrize("use", ["restore", "rm", "fork"])
async def test_a_cancelled_use_of_a_snapshot_is_done_or_undone(fake_host: AsyncHost, use: str) -> None:
    """A cancelled restore, removal or fork is complete or has changed nothing."""
    await warm(fake_host, State.RUNNING)
    await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    await learn(fake_host, "second")
    outcomes: set[str] = set()
    for nth in range(1, _MOST_WAITS):
        if not await fake_host.snapshots.ls():
            await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
        calls: dict[str, Coroutine[Any, Any, Any]] = {}
        if use == "restore":
            calls[use] = fake_host.call(SnapshotRestoreRequest(snapshot=KEPT))
        elif use == "rm":
            calls[use] = fake_host.snapshots.rm(KEPT)
        else:
            calls[use] = fake_host.call(SnapshotForkRequest(snapshot=KEPT, names=["elm"]))
        came = await cancelled_at(calls[use], nth)
        found = await assert_tidy(fake_host, *(["oak", "elm"] if use == "fork" and not came else ["oak"]))
        outcomes.add(f"{found[0].state} {len(await fake_host.snapshots.ls())}")
        if not came:
            break
        if use == "restore" and found[0].state is State.STANDBY:
            await fake_host.call(RestoreRequest(instance="oak"))
            assert await knows(fake_host, "oak") == ("first", "first")
            await learn(fake_host, "second")
        assert await knows(fake_host, "oak") == ("second", "second")
    else:
        pytest.fail("the operation waits more often than this test cancels")
    assert (
        outcomes
        == {
            "restore": {"Running 1", "Standby 1"},
            "rm": {"Running 1", "Running 0"},
            "fork": {"Running 1"},
        }[use]
    )


async def test_a_failed_start_after_a_restore_leaves_standby(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The instance is in standby at the moment of the snapshot, and can be restored."""
    await warm(fake_host, State.RUNNING)
    await fake_host.call(SnapshotRequest(instance="oak", name=KEPT))
    await learn(fake_host, "second")
    driver.faults.fail_at("restore")
    with pytest.raises(VmmError, match="restore"):
        await fake_host.call(SnapshotRestoreRequest(snapshot=KEPT, start=True))
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await knows(fake_host, "oak") == ("first", "first")
