"""A disk with as many layers as it may have is merged once, in its source: no fork of a source at rest merges."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import NoSpace
from coppice.host import admission
from coppice.machine import disk, disks, rest_disk
from coppice.model import MIB, Budgets, ForkReport, ForkResult, Instance, State
from coppice.requests import (
    ForkRequest,
    GetRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot
from fakes.pids import ended
from fakes.rooms import DEADLINES, open_rooms
from fakes.volumes import SIZE, WRITES, got, put

pytestmark = pytest.mark.parametrize("personality", ["file"], indirect=True)

LITTLE = 64 << 10  # bytes that a fork may write for each disk
MOST = 3


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each file system behave as one without reflinks, and each disk be full soon."""
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)
    monkeypatch.setattr(disk, "MOST", MOST)


@pytest.fixture
def merges(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the directories in which layers are merged, in order."""
    done: list[Path] = []
    merge_layers = driver.merge_layers

    def merge(base: Path, merged: Path, above: Sequence[Path]) -> None:
        merge_layers(base, merged, above)
        done.append(merged.parent)

    monkeypatch.setattr(driver, "merge_layers", merge)
    return done


async def get(host: AsyncHost, name: str = "oak") -> Instance:
    """Return an instance's record in its true state."""
    return await host.call(GetRequest(instance=name))


async def fill(host: AsyncHost, *, clones: bool = False) -> Instance:
    """Let the running oak have full disks, with 1 MiB in each layer, and the word `deep`; return it."""
    while not disks.are_full(oak := await get(host)):
        for each in disks.of(oak):
            with each.paths(host.local.rooms.directory(oak.id))[-1].open("r+b") as file:
                file.seek(MIB)
                file.write(b"\xa5" * MIB)
        policy: Any = "clone" if clones else "refuse"
        request = ForkRequest(
            instance="oak", names=["f"], from_running=True, target=State.STOPPED, volume_policy=policy, atomic=True
        )
        await host.call(request)
        await host.call(RmRequest(instance="f"))
    await ask(host, "oak", "save", "deep")
    return oak


async def rest(host: AsyncHost, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring the running oak to rest."""
    if how == "older":  # as a version without this merge did
        monkeypatch.setattr(disk, "MOST", MOST + 1)
    if how == "stopped":
        await host.call(StopRequest(instance="oak", grace_s=0))
    elif how == "ended":
        vmm = (await get(host)).vmm
        assert vmm is not None
        await host.local.rooms.drivers.chosen.quit(host.local.rooms.directory((await get(host)).id), vmm)
        await ended(vmm)
    else:
        await host.call(StandbyRequest(instance="oak"))
    if how in ("older", "template"):
        await host.call(PromoteRequest(instance="oak"))
    monkeypatch.setattr(disk, "MOST", MOST)


def results_of(report: ForkReport) -> list[ForkResult]:
    """Return the results of forks, each of which has written little."""
    assert [each.disk_bytes_written <= LITTLE for each in report.results] == [True] * report.count, report.results
    return list(report.results)


@pytest.mark.parametrize("how", ["standby", "template", "older", "stopped", "ended"])
async def test_no_fork_of_a_source_at_rest_merges(
    fake_host: AsyncHost, merges: list[Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The source merges its layers once. Each of its forks, then and later, gets links and an empty layer."""
    await boot(fake_host)
    oak = await fill(fake_host)
    assert merges == []
    await rest(fake_host, how, monkeypatch)
    assert len(merges) == (how == "template")  # one that is no source may never be one
    for names in (["ash", "elm"], ["fir", "yew"]):
        request = ForkRequest(instance="oak", names=names, count=2, atomic=True)
        for result in results_of(await fake_host.call(request)):
            assert await ask(fake_host, result.name, "load") == "deep"
    assert merges == [fake_host.local.rooms.directory(oak.id)]
    oak = await get(fake_host)
    expected = {"standby": State.STANDBY, "stopped": State.STOPPED, "ended": State.STOPPED}
    assert oak.state is expected.get(how, State.TEMPLATE)
    await assert_tidy(fake_host, "oak", "ash", "elm", "fir", "yew")
    assert (await fake_host.verify()).differences == ()
    if oak.state is not State.TEMPLATE:
        await fake_host.call((StartRequest if oak.state is State.STOPPED else RestoreRequest)(instance="oak"))
        assert await ask(fake_host, "oak", "load") == "deep"


@pytest.mark.parametrize("how", ["standby", "older", "ended", "running"])
async def test_no_fork_of_a_snapshot_merges(
    fake_host: AsyncHost, merges: list[Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A snapshot has the merged layers of its instance."""
    await boot(fake_host)
    await fill(fake_host)
    if how != "running":
        await rest(fake_host, how, monkeypatch)
    kept = await fake_host.call(SnapshotRequest(instance="oak"))
    assert not disks.are_full(kept)
    request = SnapshotForkRequest(snapshot=kept.id, names=["ash", "elm"], count=2, atomic=True)
    for result in results_of(await fake_host.call(request)):
        assert await ask(fake_host, result.name, "load") == "deep"
    assert len(merges) == 1
    await assert_tidy(fake_host, "oak", "ash", "elm")
    assert (await fake_host.verify()).differences == ()


async def test_forks_of_forks_at_rest_do_not_merge(fake_host: AsyncHost, merges: list[Path]) -> None:
    """A fork that is not started does not get the last layer that fits. It gets that at its start."""
    await boot(fake_host)
    await fake_host.call(StandbyRequest(instance="oak"))
    source, names = "oak", [f"g{level}" for level in range(MOST + 3)]
    for name in names:
        request = ForkRequest(instance=source, names=[name], target=State.STANDBY, atomic=True)
        results_of(await fake_host.call(request))
        assert not disks.are_full(await get(fake_host, name))
        source = name
    assert merges == []
    await assert_tidy(fake_host, "oak", *names)
    deepest = await fake_host.call(RestoreRequest(instance=source))
    assert disks.are_full(deepest)
    await ask(fake_host, deepest, "save", "own")
    (above,) = (await fake_host.call(ForkRequest(instance=names[-2], names=["elm"], atomic=True))).instances
    assert await ask(fake_host, above, "load") != "own"
    assert await ask(fake_host, deepest, "load") == "own"


@pytest.mark.parametrize("how", ["standby", "stopped", "ended"])
async def test_no_clone_of_a_volume_merges(
    fake_host: AsyncHost, merges: list[Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The layers of a volume are merged as those of the overlay, and the volume keeps its data."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    await boot(fake_host, volumes=WRITES)
    oak = await fill(fake_host, clones=True)
    put(fake_host, oak, "deep")
    await rest(fake_host, how, monkeypatch)
    request = ForkRequest(
        instance="oak", names=["ash", "elm"], count=2, target=State.STOPPED, volume_policy="clone", atomic=True
    )
    report = await fake_host.call(request)
    assert all(each.disk_bytes_written <= 2 * LITTLE for each in report.results)
    assert merges == [fake_host.local.rooms.directory(oak.id)] * 2
    assert [got(fake_host, each) for each in report.instances] == ["deep", "deep"]
    await assert_tidy(fake_host, "oak", "ash", "elm")
    await fake_host.call((RestoreRequest if how == "standby" else StartRequest)(instance="oak"))
    put(fake_host, oak, "later")
    await fake_host.call(RmRequest(instance="oak"))
    await boot(fake_host, "fir", volumes=WRITES)
    assert got(fake_host, await get(fake_host, "fir")) == "later"


@pytest.mark.parametrize("how", ["standby", "stopped"])
async def test_forks_that_come_to_rest_merge_nothing(fake_host: AsyncHost, merges: list[Path], how: str) -> None:
    """Each has as many layers as a disk can have, and shares all but its own with the others."""
    source = await boot(fake_host)
    await fake_host.call(StandbyRequest(instance=source.id))
    for _ in range(MOST - 1):
        (source,) = (await fake_host.call(ForkRequest(instance=source.id, atomic=True))).instances
        await fake_host.call(StandbyRequest(instance=source.id))
    names = ["ash", "elm", "fir"]
    report = await fake_host.call(ForkRequest(instance=source.id, names=names, count=3, atomic=True))
    assert [disks.are_full(each) for each in report.instances] == [True] * 3
    for name in names:
        request = StandbyRequest(instance=name) if how == "standby" else StopRequest(instance=name, grace_s=0)
        await fake_host.call(request)
    assert merges == []


async def test_a_merge_keeps_the_disk_floor(
    fake_home: Path, driver: FakeDriver, merges: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guests that run need the free space below it."""
    budgets = Budgets(max_instances=100, memory_bytes=1 << 40, memory_overcommit=1, disk_floor_bytes=0)
    options: Any = {"driver": driver, "deadlines": DEADLINES, "open_rooms": open_rooms, "spares": 0}
    async with AsyncHost(fake_home, budgets=budgets, **options) as host:
        await boot(host)
        await fill(host)
        await rest(host, "older", monkeypatch)
    budgets = msgspec.structs.replace(budgets, disk_floor_bytes=1 << 60)
    async with AsyncHost(fake_home, budgets=budgets, **options) as host:
        with pytest.raises(NoSpace):
            await host.call(ForkRequest(instance="oak", atomic=True))
    assert merges == []


@pytest.mark.parametrize("how", ["standby", "stopped", "older"])
async def test_a_full_file_system_leaves_the_machine_as_it_was(
    fake_host: AsyncHost, driver: FakeDriver, merges: list[Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """No fork is made, and the source keeps its layers. They are merged later."""
    await boot(fake_host)
    await fill(fake_host)
    await rest(fake_host, how, monkeypatch)

    def refuse(*_: object) -> None:
        raise NoSpace("the disk is full", hint="see the test")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "merge_layers", refuse)
        with pytest.raises(NoSpace):
            await fake_host.call(ForkRequest(instance="oak", atomic=True))
        (oak,) = await assert_tidy(fake_host, "oak")
        assert len(disks.of(oak)[0].layers) == MOST
    results_of(await fake_host.call(ForkRequest(instance="oak", names=["ash"], atomic=True)))
    assert await ask(fake_host, "ash", "load") == "deep"
    assert len(merges) == 1


@pytest.mark.parametrize("came", ["begun", "merged", "recorded"])
async def test_a_killed_merge_leaves_the_template_whole(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, monkeypatch: pytest.MonkeyPatch, came: str
) -> None:
    """Whatever step the process came to, the next one finds a template with all its data, and forks it."""
    await boot(fake_host)
    await fill(fake_host)
    await rest(fake_host, "older", monkeypatch)
    oak, rooms = await get(fake_host), fake_host.local.rooms
    dead_store.begin(oak, JournalOperation.MERGE)
    if came == "merged":
        disk.merge_all(rooms.directory(oak.id), disks.of(oak)[0], rooms.driver(oak))
        (rooms.directory(oak.id) / ".overlay.9.tmp-1").touch()
    if came == "recorded":
        rest_disk._merge(rooms, oak)
    async with make_host() as next_host:
        (oak,) = await assert_tidy(next_host, "oak")
        assert (oak.state, disks.are_full(oak)) == (State.TEMPLATE, came != "recorded")
        results_of(await next_host.call(ForkRequest(instance="oak", names=["ash", "elm"], count=2, atomic=True)))
        assert await ask(next_host, "elm", "load") == "deep"
        await assert_tidy(next_host, "oak", "ash", "elm")
        assert (await next_host.verify()).differences == ()


async def test_a_fork_cancelled_in_the_merge_leaves_the_template_whole(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancelled call does not learn that the merge is recorded."""
    await boot(fake_host)
    await fill(fake_host)
    await rest(fake_host, "older", monkeypatch)
    original, loop = rest_disk._merge, asyncio.get_running_loop()

    async def cancel() -> None:
        forking.cancel()

    def cancelled(*args: Any) -> None:
        original(*args)
        asyncio.run_coroutine_threadsafe(cancel(), loop).result(10)

    request = ForkRequest(instance="oak", names=["ash"], atomic=True)
    with monkeypatch.context() as patch:
        patch.setattr(rest_disk, "_merge", cancelled)
        forking = asyncio.create_task(fake_host.call(request))
        with pytest.raises(asyncio.CancelledError):
            await forking
    (oak,) = await assert_tidy(fake_host, "oak")
    assert (oak.state, disks.are_full(oak)) == (State.TEMPLATE, False)
    results_of(await fake_host.call(request))
    assert await ask(fake_host, "ash", "load") == "deep"


async def test_a_cancelled_merge_that_cannot_be_ended_is_cancelled(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the end does not replace the cancellation: the fork does not go on."""
    await boot(fake_host)
    await fill(fake_host)
    await rest(fake_host, "older", monkeypatch)

    def cancelled(*_: object) -> None:
        loop.call_soon_threadsafe(forking.cancel)

    async def full(*_: object) -> Instance:
        raise NoSpace("the disk is full", hint="see the test")

    loop = asyncio.get_running_loop()
    with monkeypatch.context() as patch:
        patch.setattr(rest_disk, "_merge", cancelled)
        patch.setattr(rest_disk, "finish", full)
        forking = asyncio.create_task(fake_host.call(ForkRequest(instance="oak", names=["ash"], atomic=True)))
        with pytest.raises(asyncio.CancelledError):
            await forking
    await rest_disk.finish(fake_host.local.rooms, await get(fake_host))
    await assert_tidy(fake_host, "oak")


async def test_first_forks_at_the_same_time_merge_once(
    fake_host: AsyncHost, merges: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but one wait for the merge."""
    await boot(fake_host)
    await fill(fake_host)
    await rest(fake_host, "older", monkeypatch)
    requests = [ForkRequest(instance="oak", names=[name], atomic=True) for name in ("ash", "elm", "fir")]
    for report in await asyncio.gather(*(fake_host.call(request) for request in requests)):
        results_of(report)
    assert len(merges) == 1
    await assert_tidy(fake_host, "oak", "ash", "elm", "fir")


async def test_a_fork_does_not_wait_long_for_the_merge(
    fake_host: AsyncHost, merges: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another operation uses the source, a fork merges the layers for itself."""
    monkeypatch.setattr(admission, "_MERGE_LOCK_S", 0.05)
    await boot(fake_host)
    await fill(fake_host)
    await rest(fake_host, "older", monkeypatch)
    oak = await get(fake_host)
    request = ForkRequest(instance="oak", names=["ash"], atomic=True)
    async with locks.hold(fake_host.local.rooms.layout.lock(oak.id), shared=True):
        (ash,) = (await fake_host.call(request)).instances
    assert await ask(fake_host, ash, "load") == "deep"
    assert merges == [fake_host.local.rooms.directory(ash.id)]
    assert disks.are_full(await get(fake_host))
    await assert_tidy(fake_host, "oak", "ash")


async def test_an_imported_template_is_merged(
    fake_host: AsyncHost, elsewhere: AsyncHost, merges: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive of an older version may have as many layers as a disk can have."""
    await boot(fake_host)
    await fill(fake_host)
    await rest(fake_host, "older", monkeypatch)
    await (await fake_host.get("oak")).export(tmp_path / "archive")
    made = await elsewhere.import_template(tmp_path / "archive")
    assert disks.are_full(made.record)
    results_of(await elsewhere.call(ForkRequest(instance="oak", names=["ash"], atomic=True)))
    assert len(merges) == 1
    assert await ask(elsewhere, "ash", "load") == "deep"
    assert (await elsewhere.verify()).differences == ()
    await assert_tidy(elsewhere, "oak", "ash")
