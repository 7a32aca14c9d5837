"""Snapshots: they keep a moment, need neither source nor forks, and take an instance back; whatever fails or is cancelled leaves nothing half-made."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from coppice.errors import HostCannot, IllegalTransition, InUse, InvalidName, NameTaken, NotFound, UsageError, VmmError
from coppice.host import AsyncHost
from coppice.instance import live, rollback
from coppice.memory.maps import FileIdentity
from coppice.model import Instance, SnapshotKind, State
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, cancelled_at, fingerprint, make, memory_of, snapshot
from fakes.rooms import IMAGE

KEPT = "kept"
_MOST_WAITS = 400
STANDBY, STOPPED = SnapshotKind.STANDBY, SnapshotKind.STOPPED


async def warm(host: AsyncHost, state: State, *, private: bool = False) -> Instance:
    """An instance that knows `first` in memory (unless it is Stopped) and on its disk; where `private`, it has been restored once."""
    oak = await boot(host)
    if private:
        await host.standby("oak")
        oak = await host.restore("oak")
    await learn(host, "first")
    if state is State.STOPPED:
        return await host.stop("oak")
    if state is not State.RUNNING:
        oak, _ = await host.standby("oak")
    return await host.promote("oak") if state is State.TEMPLATE else oak


async def learn(host: AsyncHost, lesson: str, name: str = "oak") -> None:
    """Have it in memory and on disk."""
    await ask(host, name, "remember", "lesson", lesson)
    await ask(host, name, "save", lesson)


async def knows(host: AsyncHost, name: str) -> tuple[str, str]:
    """What a machine that runs has in memory and on its disk."""
    result = await host.exec(name, ["recall", "lesson"])
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
    """From every state: forks of the snapshot know what was known then, whatever the source did since, and though it is gone."""
    host = fake_host
    source = await warm(host, state, private=private)
    if (state, kind) == (State.STOPPED, STANDBY):
        before = snapshot(host)
        with pytest.raises(IllegalTransition, match="no memory"):
            await host.snapshot_create("oak", kind=kind)
        assert snapshot(host) == before
        return
    made = await host.snapshot_create("oak", name=KEPT, kind=kind, tags={"team": "a"})
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
    await host.rm("oak")
    report = await host.snapshot_fork(KEPT, names=["elm", "fir"], count=2)
    assert report.succeeded == 2, report
    for fork in report.instances:
        assert (fork.snapshot, fork.parent, fork.parent_name) == (made.id, None, "oak")
        assert await ask(host, fork, "hostname") == fork.name
        assert await knows(host, fork.name) == ("first" if with_memory else "", "first")
    await assert_tidy(host, "elm", "fir")
    assert (await host.snapshot_inspect(KEPT)).snapshot == made


@pytest.mark.parametrize("private", [False, True], ids=["first boot", "private mapping"])
async def test_a_source_that_ran_can_be_captured_and_forked_as_ever(fake_host: AsyncHost, private: bool) -> None:
    """After the snapshot of a running machine nothing about it has changed: it stands by, is restored, and its memory is whole."""
    await warm(fake_host, State.RUNNING, private=private)
    await fake_host.snapshot_create("oak", name="one")
    await learn(fake_host, "second")
    await fake_host.snapshot_create("oak", name="two")
    await fake_host.standby("oak")
    await fake_host.restore("oak")
    assert await knows(fake_host, "oak") == ("second", "second")
    await fake_host.snapshot_fork("one", names=["elm"])
    await fake_host.snapshot_fork("two", names=["fir"])
    assert await knows(fake_host, "elm") == ("first", "first")
    assert await knows(fake_host, "fir") == ("second", "second")
    await assert_tidy(fake_host, "oak", "elm", "fir")


async def test_where_the_mapping_cannot_be_changed_memory_is_copied(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of a first boot is as good by a copy; the source goes on in its own file."""

    def refuse(pid: int, identity: FileIdentity) -> int:
        raise HostCannot("no tracing here", hint="copy")

    monkeypatch.setattr(live, "make_private", refuse)
    await warm(fake_host, State.RUNNING)
    await fake_host.snapshot_create("oak", name=KEPT)
    await learn(fake_host, "second")
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.mem_file is None
    await fake_host.snapshot_fork(KEPT, names=["elm"])
    assert await knows(fake_host, "elm") == ("first", "first")
    assert await knows(fake_host, "oak") == ("second", "second")


async def test_it_shares_memory_and_never_changes(fake_host: AsyncHost) -> None:
    """One link more on the source's inode, and none fewer for its forks when it goes; its files stay what they were while forks write and are captured."""
    oak = await warm(fake_host, State.STANDBY)
    memory = memory_of(fake_host, oak)
    made = await fake_host.snapshot_create("oak", name=KEPT)
    directory = fake_host.rooms.layout.snapshot(made.id)
    assert (directory / files.MEMORY).stat().st_ino == memory.stat().st_ino
    assert memory.stat().st_nlink == 2
    before = [fingerprint(path) for path in sorted(directory.iterdir())]
    assert all(mode & 0o222 == 0 for _, mode, _, _ in before)
    report = await fake_host.snapshot_fork(KEPT, names=["elm", "fir"], count=2)
    assert memory.stat().st_nlink == 4
    assert [fork.parent for fork in report.instances] == [oak.id] * 2
    await learn(fake_host, "else", "elm")
    await fake_host.standby("elm")
    assert [fingerprint(path) for path in sorted(directory.iterdir())] == before
    found = await fake_host.snapshot_inspect(made)
    assert (found.link_count, found.forks, found.source_lives) == (3, ("elm", "fir"), True)
    assert found.memory_bytes > 0
    assert found.disk_bytes > 0
    await fake_host.snapshot_rm(KEPT)
    assert memory.stat().st_nlink == 2
    await assert_tidy(fake_host, "oak", "elm", "fir")
    await fake_host.restore("elm")
    assert await knows(fake_host, "elm") == ("else", "else")
    assert await knows(fake_host, "fir") == ("first", "first")


async def test_names_and_filters(fake_host: AsyncHost) -> None:
    """Names are unique among snapshots and validated; they are found by name, id or record, listed by source and tag; what is not there is not found."""
    oak = await make(fake_host, State.STANDBY)
    one = await fake_host.snapshot_create("oak", name="oak", tags={"a": "1"})  # an instance may have the same name
    two = await fake_host.snapshot_create("oak", tags={"a": "1", "b": "2"})
    await make(fake_host, State.STOPPED, "elm")
    three = await fake_host.snapshot_create("elm", name="three")
    assert two.name.startswith("oak-")
    before = snapshot(fake_host)
    with pytest.raises(NameTaken, match="'oak'"):
        await fake_host.snapshot_create("elm", name="oak")
    with pytest.raises(InvalidName):
        await fake_host.snapshot_create("elm", name="../x")
    with pytest.raises(UsageError):
        await fake_host.snapshot_create("elm", tags={"": ""})
    for call in (
        fake_host.snapshot_inspect,
        fake_host.snapshot_restore,
        fake_host.snapshot_fork,
        fake_host.snapshot_rm,
    ):
        with pytest.raises(NotFound, match="no snapshot"):
            await call("nobody")
    assert snapshot(fake_host) == before
    assert await fake_host.snapshot_ls() == [one, two, three]
    assert await fake_host.snapshot_ls(source="oak") == await fake_host.snapshot_ls(source=oak) == [one, two]
    assert await fake_host.snapshot_ls(source=oak.id, tags={"b": "2"}) == [two]
    assert await fake_host.snapshot_ls(tags={"b": "1"}) == []
    for reference in ("three", three.id, three):
        assert (await fake_host.snapshot_inspect(reference)).snapshot == three
    with pytest.raises(InUse, match="three"):
        await fake_host.image_rm(IMAGE)


async def test_a_stopped_snapshot_has_no_memory_to_fork(fake_host: AsyncHost) -> None:
    """It is refused as the fork of a Stopped instance to Standby is; to Stopped it works from both kinds."""
    await warm(fake_host, State.STANDBY)
    await fake_host.snapshot_create("oak", name="disk", kind=STOPPED)
    await fake_host.snapshot_create("oak", name="both")
    with pytest.raises(IllegalTransition, match="no memory"):
        await fake_host.snapshot_fork("disk", target=State.STANDBY)
    for number, name in enumerate(("disk", "both")):
        (fork,) = (await fake_host.snapshot_fork(name, names=[f"elm-{number}"], target=State.STOPPED)).instances
        assert fork.state is State.STOPPED
    await assert_tidy(fake_host, "oak", "elm-0", "elm-1")


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("kind", [STANDBY, STOPPED])
@pytest.mark.parametrize("state", [State.STOPPED, State.STANDBY, State.RUNNING])
async def test_back_to_a_snapshot(fake_host: AsyncHost, state: State, kind: SnapshotKind, start: bool) -> None:
    """Memory and disk are those of the moment, whatever the instance is now and has done since; it is the same machine, and can go back again."""
    host = fake_host
    await warm(host, State.RUNNING)
    made = await host.snapshot_create("oak", name=KEPT, kind=kind)
    vmm = (await host.get("oak")).vmm
    for _ in range(2):
        await learn(host, "second")
        if state is State.STOPPED:
            await host.stop("oak", grace_s=0)
        elif state is State.STANDBY:
            await host.standby("oak")
        oak = await host.snapshot_restore(KEPT, start=start)
        assert oak.snapshot == made.id
        assert (oak.mem_file is not None) == (kind is STANDBY)
        if not start:
            assert oak.state is (State.STANDBY if kind is STANDBY else State.STOPPED)
            await assert_tidy(host, "oak")
            oak = await (host.restore if kind is STANDBY else host.start)("oak")
        await assert_tidy(host, "oak")
        assert oak.state is State.RUNNING
        assert oak.vmm != vmm
        assert await ask(host, "oak", "hostname") == "oak"
        assert await knows(host, "oak") == ("first" if kind is STANDBY else "", "first")
    await host.standby("oak")
    await host.restore("oak")
    assert (await knows(host, "oak"))[1] == "first"


async def test_a_commit_that_is_cancelled_goes_back_all_the_same(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was killed while it took a commit back would have the next one finish what has no files any more."""
    await warm(fake_host, State.RUNNING)
    await fake_host.snapshot_create("oak", name=KEPT)
    await learn(fake_host, "second")
    store, loop = fake_host.rooms.store, asyncio.get_running_loop()
    begin = store.begin

    def cancelled_commit(instance: Instance, operation: str) -> None:
        begin(instance, operation)
        if operation == rollback.COMMITTED:
            loop.call_soon_threadsafe(task.cancel)

    monkeypatch.setattr(store, "begin", cancelled_commit)
    task = asyncio.create_task(fake_host.snapshot_restore(KEPT))
    with pytest.raises(asyncio.CancelledError):
        await task
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY
    monkeypatch.undo()
    await fake_host.restore("oak")
    assert await knows(fake_host, "oak") == ("first", "first")


async def test_back_is_the_same_machine(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Machine-id, MAC and name are as before; entropy is fresh, and the serial larger than any that was used."""
    oak = await warm(fake_host, State.RUNNING)
    directory = fake_host.rooms.directory(oak.id)
    before = driver.guest_state(directory)
    await fake_host.snapshot_create("oak", name=KEPT)
    for _ in range(2):
        await fake_host.standby("oak")
        await fake_host.restore("oak")
    serial = driver.guest_state(directory).serial
    await fake_host.snapshot_restore(KEPT, start=True)
    after = driver.guest_state(directory)
    assert after.serial > serial
    assert after.entropy != before.entropy
    for field in ("hostname", "machine_id", "boot_id", "mac"):
        assert getattr(after, field) == getattr(before, field), field


async def test_who_cannot_go_back(fake_host: AsyncHost) -> None:
    """A template, whose forks share its memory, and one that is gone: refused with the way out, and nothing changed."""
    await warm(fake_host, State.TEMPLATE)
    await fake_host.snapshot_create("oak", name=KEPT)
    before = snapshot(fake_host)
    with pytest.raises(IllegalTransition, match="demote"):
        await fake_host.snapshot_restore(KEPT)
    assert snapshot(fake_host) == before
    await fake_host.rm("oak")
    with pytest.raises(NotFound, match="coppice snapshot fork kept"):
        await fake_host.snapshot_restore(KEPT)
    await assert_tidy(fake_host)


async def test_a_restored_mem_file_that_was_truncated_is_refused(fake_host: AsyncHost) -> None:
    """Neither a fork nor the instance itself gets memory that is not what was captured; the instance runs on."""
    await warm(fake_host, State.RUNNING, private=True)
    made = await fake_host.snapshot_create("oak", name=KEPT)
    memory = fake_host.rooms.layout.snapshot(made.id) / files.MEMORY
    memory.chmod(0o644)
    with memory.open("r+b") as file:
        file.truncate(1 << 20)
    memory.chmod(0o444)
    with pytest.raises(Exception, match="its size is"):
        await fake_host.snapshot_restore(KEPT)
    report = await fake_host.snapshot_fork(KEPT)
    assert "its size is" in (report.results[0].error or "")
    await assert_tidy(fake_host, "oak")
    assert await knows(fake_host, "oak") == ("first", "first")


@pytest.mark.parametrize("kind", [STANDBY, STOPPED])
@pytest.mark.parametrize("step", ["pause", "save_devices", "resume", "freeze", "thaw"])
async def test_a_source_runs_on_where_its_snapshot_fails(
    fake_host: AsyncHost, driver: FakeDriver, step: str, kind: SnapshotKind
) -> None:
    """An error at any step of it: nothing of the snapshot is left, its name is free, and the guest answers. Without the agent it works too."""
    await warm(fake_host, State.RUNNING)
    driver.faults.fail_at(step)
    works = step in ("freeze", "thaw") or (step, kind) == ("save_devices", STOPPED)
    if works:
        await fake_host.snapshot_create("oak", name=KEPT, kind=kind)
    else:
        with pytest.raises(VmmError, match=step):
            await fake_host.snapshot_create("oak", name=KEPT, kind=kind)
    await assert_tidy(fake_host, "oak")
    assert [found.name for found in await fake_host.snapshot_ls()] == ([KEPT] if works else [])
    assert await knows(fake_host, "oak") == ("first", "first")
    if not works:
        await fake_host.snapshot_create("oak", name=KEPT, kind=kind)


@pytest.mark.parametrize(
    ("state", "kind"), [(State.STANDBY, STANDBY), (State.RUNNING, STANDBY), (State.RUNNING, STOPPED)]
)
async def test_a_cancelled_snapshot_is_whole_or_not_there(
    fake_host: AsyncHost, state: State, kind: SnapshotKind
) -> None:
    """Every wait of it in turn: the source is as it was, and knows what it knew."""
    await warm(fake_host, state)
    for nth in range(1, _MOST_WAITS):
        came = await cancelled_at(fake_host.snapshot_create("oak", name=KEPT, kind=kind), nth)
        (oak,) = await assert_tidy(fake_host, "oak")
        assert oak.state is state
        if not came:
            break
        assert await fake_host.snapshot_ls() == []
    else:
        pytest.fail("a snapshot waits more often than this test cancels")
    assert nth > 5
    assert [found.name for found in await fake_host.snapshot_ls()] == [KEPT]
    if state is State.RUNNING:
        assert await knows(fake_host, "oak") == ("first", "first")


@pytest.mark.parametrize("use", ["restore", "rm", "fork"])
async def test_a_cancelled_use_of_a_snapshot_is_done_or_undone(fake_host: AsyncHost, use: str) -> None:
    """Back at the moment or as before, gone or there, forked or not: never between."""
    await warm(fake_host, State.RUNNING)
    await fake_host.snapshot_create("oak", name=KEPT)
    await learn(fake_host, "second")
    outcomes: set[str] = set()
    for nth in range(1, _MOST_WAITS):
        if not await fake_host.snapshot_ls():
            await fake_host.snapshot_create("oak", name=KEPT)
        calls: dict[str, Coroutine[Any, Any, Any]] = {}
        if use == "restore":
            calls[use] = fake_host.snapshot_restore(KEPT)
        elif use == "rm":
            calls[use] = fake_host.snapshot_rm(KEPT)
        else:
            calls[use] = fake_host.snapshot_fork(KEPT, names=["elm"])
        came = await cancelled_at(calls[use], nth)
        found = await assert_tidy(fake_host, *(["oak", "elm"] if use == "fork" and not came else ["oak"]))
        outcomes.add(f"{found[0].state} {len(await fake_host.snapshot_ls())}")
        if not came:
            break
        if use == "restore" and found[0].state is State.STANDBY:
            await fake_host.restore("oak")
            assert await knows(fake_host, "oak") == ("first", "first")
            await learn(fake_host, "second")
        assert await knows(fake_host, "oak") == ("second", "second")
    else:
        pytest.fail("it waits more often than this test cancels")
    assert (
        outcomes
        == {
            "restore": {"Running 1", "Standby 1"},
            "rm": {"Running 1", "Running 0"},
            "fork": {"Running 1"},
        }[use]
    )


async def test_a_start_that_fails_after_going_back_is_at_rest(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """It is Standby at the moment of the snapshot, and can be restored."""
    await warm(fake_host, State.RUNNING)
    await fake_host.snapshot_create("oak", name=KEPT)
    await learn(fake_host, "second")
    driver.faults.fail_at("restore")
    with pytest.raises(VmmError, match="restore"):
        await fake_host.snapshot_restore(KEPT, start=True)
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY
    await fake_host.restore("oak")
    assert await knows(fake_host, "oak") == ("first", "first")
