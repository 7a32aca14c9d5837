"""Forks of a machine that writes to a volume: each gets a clone of its own, and the volume stays as it is."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.content import overlay
from coppice.errors import NoSpace
from coppice.linux import clone
from coppice.machine import disk, volumes
from coppice.model import MIB, Budgets, Instance, SnapshotKind, State
from coppice.names import new_id
from coppice.requests import (
    ForkRequest,
    InspectRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotInspectRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, cancelled_at, make_threads_late
from fakes.rooms import DEADLINES, open_rooms
from fakes.volumes import SIZE, WRITES, at, got, own_link, paths_of, put, refused, with_volume

_MOST_WAITS = 400

once = pytest.mark.parametrize("personality", ["file"], indirect=True)  # no part of it depends on the VMM


async def make_writer(host: AsyncHost, state: State = State.RUNNING) -> Instance:
    """Return `oak` in a state, with the volume `data` on which it has written `warm`."""
    await host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(host, WRITES)
    put(host, oak, "warm")
    if state is State.STANDBY:
        oak = (await host.call(StandbyRequest(instance=oak.id))).instance
    if state is State.STOPPED:
        oak = await host.call(StopRequest(instance=oak.id))
    return oak


async def fork(host: AsyncHost, source: Instance, *names: str, **options: Any) -> tuple[Instance, ...]:
    """Return forks of a machine, with clones of the volumes that it writes to."""
    request = ForkRequest(
        instance=source.id,
        names=names,
        count=len(names),
        atomic=True,
        volume_policy="clone",
        from_running=source.state is State.RUNNING,
        **options,
    )
    return (await host.call(request)).instances


@pytest.mark.parametrize(
    ("state", "target"),
    [
        (State.RUNNING, State.RUNNING),
        (State.RUNNING, State.STOPPED),
        (State.STANDBY, State.RUNNING),
        (State.STANDBY, State.STANDBY),
        (State.STANDBY, State.STOPPED),
        (State.STOPPED, State.RUNNING),
        (State.STOPPED, State.STOPPED),
    ],
)
async def test_each_fork_has_a_clone_of_its_own(
    fake_host: AsyncHost, driver: FakeDriver, state: State, target: State
) -> None:
    """Two forks write different things. Neither reaches the other, the volume or the source."""
    oak = await make_writer(fake_host, state)
    data = fake_host.local.rooms.layout.volume_disk(oak.machine.volumes[0].volume_id)
    before = (data.stat().st_ino, data.stat().st_mtime_ns, await asyncio.to_thread(data.read_bytes))
    elm, fir = await fork(fake_host, oak, "elm", "fir", target=target)
    for each in (elm, fir):
        (clone_of,) = each.machine.volumes
        assert (clone_of.volume_name, clone_of.private, clone_of.readonly) == ("data", True, False)
        assert got(fake_host, each) == "warm"
        assert paths_of(fake_host, each)[-1].stat().st_nlink == 1
        put(fake_host, each, each.name)
    assert [got(fake_host, each) for each in (elm, fir, oak)] == ["elm", "fir", "warm"]
    assert before == (data.stat().st_ino, data.stat().st_mtime_ns, await asyncio.to_thread(data.read_bytes))
    assert [each.name for each in (await fake_host.volumes.inspect("data")).volume.attachments] == ["oak"]
    if target is State.RUNNING:
        assert driver.guest_state(fake_host.local.rooms.directory(elm.id)).mounts == ("0 rw /data",)
    await assert_tidy(fake_host, "oak", "elm", "fir")
    await fake_host.call(RmRequest(instance="elm"))
    await fake_host.call(RmRequest(instance="oak"))
    await fake_host.volumes.rm("data")  # a clone is no holder
    assert got(fake_host, fir) == "fir"
    await assert_tidy(fake_host, "fir")


@once
async def test_the_policy_is_to_refuse(fake_host: AsyncHost) -> None:
    """Without the policy nothing is cloned, and the hint says how. Promotion and snapshots have no such policy."""
    oak = await make_writer(fake_host, State.STANDBY)
    error = await refused(fake_host, fake_host.call(ForkRequest(instance=oak.id)), "only writer of the volume data")
    assert "--volume-policy clone" in (error.hint or "")
    for request in (PromoteRequest(instance=oak.id), SnapshotRequest(instance=oak.id)):
        error = await refused(fake_host, fake_host.call(request), "only writer of the volume data")
        assert "--volume-policy" not in (error.hint or "")


async def test_a_clone_lives_through_every_state_of_its_machine(fake_host: AsyncHost) -> None:
    """Standby and restore keep memory and clone together; stop and start keep the clone."""
    oak = await make_writer(fake_host, State.STANDBY)
    (elm,) = await fork(fake_host, oak, "elm")
    put(fake_host, elm, "later")
    for request in (
        StandbyRequest(instance="elm"),
        RestoreRequest(instance="elm"),
        StopRequest(instance="elm"),
        StartRequest(instance="elm"),
    ):
        await fake_host.call(request)
        assert got(fake_host, elm) == "later"
        await assert_tidy(fake_host, "oak", "elm")
    await ask(fake_host, "elm", "hostname")
    await fake_host.call(StandbyRequest(instance="elm"))
    assert (await fake_host.gc(caches=True)).removed == ()
    assert (await fake_host.verify()).differences == ()


async def test_a_machine_with_clones_is_forked_and_promoted_like_any_other(fake_host: AsyncHost) -> None:
    """A clone is its machine's own disk, so no policy is needed: a template may have a warm clone."""
    oak = await make_writer(fake_host, State.STANDBY)
    (elm,) = await fork(fake_host, oak, "elm")
    put(fake_host, elm, "template")
    (ivy,) = (await fake_host.call(ForkRequest(instance="elm", names=["ivy"], from_running=True))).instances
    elm = (await fake_host.call(StandbyRequest(instance="elm"))).instance
    await fake_host.call(PromoteRequest(instance="elm"))
    forks = (await fake_host.call(ForkRequest(instance="elm", names=["fir"], count=2))).instances
    for each in (ivy, *forks):
        assert got(fake_host, each) == "template"
        put(fake_host, each, each.name)
    assert got(fake_host, elm) == "template"
    await assert_tidy(fake_host, "oak", "elm", "ivy", "fir-1", "fir-2")


@pytest.mark.parametrize("kind", list(SnapshotKind))
@pytest.mark.parametrize("state", [State.RUNNING, State.STANDBY])
async def test_a_snapshot_has_the_clones_of_its_instant(fake_host: AsyncHost, state: State, kind: SnapshotKind) -> None:
    """The snapshot's file never changes; the machine returns to it, and others are forked from it."""
    oak = await make_writer(fake_host, State.STANDBY)
    (elm,) = await fork(fake_host, oak, "elm")
    put(fake_host, elm, "noon")
    if state is State.STANDBY:
        await fake_host.call(StandbyRequest(instance="elm"))
    kept = await fake_host.call(SnapshotRequest(instance="elm", name="noon", kind=kind))
    frozen = fake_host.local.rooms.layout.snapshot(kept.id) / "volume0.raw"
    assert stat.S_IMODE(frozen.stat().st_mode) == 0o444
    newest = paths_of(fake_host, kept)[-1]
    assert (await fake_host.call(SnapshotInspectRequest(snapshot="noon"))).disk_bytes > frozen.stat().st_blocks * 512
    if state is State.STANDBY:
        await fake_host.call(RestoreRequest(instance="elm"))
    put(fake_host, elm, "evening")
    await fake_host.call(SnapshotRestoreRequest(snapshot="noon", start=True))
    assert got(fake_host, elm) == "noon"
    put(fake_host, elm, "again")
    (ash,) = (await fake_host.call(SnapshotForkRequest(snapshot="noon", names=["ash"], atomic=True))).instances
    assert got(fake_host, ash) == got(fake_host, kept) == "noon"
    assert (await fake_host.verify()).differences == ()
    await assert_tidy(fake_host, "oak", "elm", "ash")
    newest.chmod(0o600)
    newest.write_bytes(newest.read_bytes().replace(b"noon", b"eve!"))
    newest.chmod(0o444)
    assert "noon" in {each.name for each in (await fake_host.verify()).differences}


@once
async def test_read_only_volumes_stay_shared(fake_host: AsyncHost) -> None:
    """Only volumes that the source writes to are cloned."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    models = await fake_host.volumes.create("models", size_bytes=SIZE)
    mounts = (at("/models", "models", readonly=True), at("/data"))
    oak = await with_volume(fake_host, mounts)
    (elm,) = await fork(fake_host, oak, "elm")
    assert [disk.private for disk in elm.machine.volumes] == [False, True]
    assert own_link(fake_host, elm, 0).samefile(fake_host.local.rooms.layout.volume_disk(models.id))
    assert not any(paths_of(fake_host, elm, 1)[-1].samefile(path) for path in paths_of(fake_host, oak, 1))
    await assert_tidy(fake_host, "oak", "elm")


@once
async def test_verify_checks_clones(fake_host: AsyncHost) -> None:
    """A damaged clone and a missing one are named."""
    oak = await make_writer(fake_host, State.STOPPED)
    elm, fir = await fork(fake_host, oak, "elm", "fir", target=State.STOPPED)
    assert (await fake_host.verify()).differences == ()
    with paths_of(fake_host, elm)[-1].open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 65536)
    paths_of(fake_host, fir)[-1].unlink()
    found = {(each.name, each.file, each.detail) for each in (await fake_host.verify()).differences}
    assert {(name, file) for name, file, _ in found} == {("elm", "volume0.raw"), ("fir", "volume0.raw")}
    assert ("fir", "volume0.raw", "it is missing") in found


@pytest.mark.parametrize("personality", ["file", "firecracker"], indirect=True)
async def test_the_cost_of_clones_is_reported(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without reflinks a fork reports the bytes of its layers or copy; `inspect` counts the clone as the fork's disk."""
    monkeypatch.setattr(clone, "_reflink", lambda *_: False)
    oak = await make_writer(fake_host)
    with own_link(fake_host, oak).open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"\xa5" * (1 << 20))
    request = ForkRequest(instance="oak", names=["elm"], from_running=True, volume_policy="clone", atomic=True)
    (result,) = (await fake_host.call(request)).results
    if driver.capabilities.layer_format:
        assert result.disk_bytes_written <= 128 << 10
    else:
        assert result.disk_bytes_written > 1 << 20
    assert (await fake_host.call(InspectRequest(instance="elm"))).disk_bytes > 1 << 20


@pytest.mark.parametrize("personality", ["file", "firecracker"], indirect=True)
@pytest.mark.parametrize("state", [State.RUNNING, State.STANDBY])
async def test_a_full_disk_leaves_nothing(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    """If a clone cannot be made, there is no fork, and the source goes on with its volume."""
    oak = await make_writer(fake_host, state)

    def full(source: Path, destination: Path, **options: Any) -> clone.CloneResult:
        if destination.name.startswith("volume"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return clone.clone_file(source, destination, **options)

    with monkeypatch.context() as patch:
        for module in (disk, overlay):
            patch.setattr(module, "clone_file", full)
        with pytest.raises(NoSpace):
            await fork(fake_host, oak, "elm", "fir")
    await assert_tidy(fake_host, "oak")
    if state is State.STANDBY:
        await fake_host.call(RestoreRequest(instance="oak"))
    assert await ask(fake_host, "oak", "hostname") == "oak"
    assert got(fake_host, oak) == "warm"


@once
@pytest.mark.parametrize("state", [State.RUNNING, State.STOPPED])
async def test_a_cancelled_fork_leaves_no_clone(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """The fork is cancelled at each of its waits in turn, until it completes."""
    oak = await make_writer(fake_host, state)
    make_threads_late(monkeypatch)
    for nth in range(1, _MOST_WAITS):
        if not await cancelled_at(fork(fake_host, oak, "elm", target=State.STOPPED), nth):
            break
        await assert_tidy(fake_host, "oak")
        assert got(fake_host, oak) == "warm"
    else:
        pytest.fail("a fork waits more often than this test cancels")
    assert nth > 2
    await assert_tidy(fake_host, "oak", "elm")


@once
@pytest.mark.parametrize("came", ["record", "half a clone", "clone"])
async def test_an_interrupted_fork_is_removed_with_its_clone(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, came: str
) -> None:
    """Whatever a killed process has made of the clone goes, and the volume keeps its data."""
    oak = await make_writer(fake_host, State.STOPPED)
    half = msgspec.structs.replace(
        oak, id=new_id(), name="elm", state=State.CREATED, machine=volumes.with_clones(oak.machine), vmm_user=None
    )
    dead_store.create([half], JournalOperation.FORK)
    directory = fake_host.local.rooms.directory(half.id)
    if came != "record":
        directory.mkdir()
        name = "volume0.raw" if came == "clone" else ".volume0.raw.0123456789ab.tmp"
        (directory / name).write_bytes(own_link(fake_host, oak).read_bytes())
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        assert got(next_host, oak) == "warm"
        (elm,) = await fork(next_host, oak, "elm", target=State.STOPPED)
        assert got(next_host, elm) == "warm"


@pytest.mark.parametrize("personality", ["firecracker"], indirect=True)  # a layer is counted as that of the overlay is
async def test_clones_count_for_the_budget(
    driver: FakeDriver, fake_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without layers and reflinks the forks' copies must fit above the floor; nothing is made if they do not."""
    monkeypatch.setattr(clone, "_reflink", lambda *_: False)
    async with AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        oak = await make_writer(host, State.STOPPED)
        with own_link(host, oak).open("r+b") as file:
            for number in range(SIZE >> 20):
                file.seek(number << 20)
                file.write(b"\xa5" * (1 << 20))
    free = os.statvfs(fake_home)
    budgets = Budgets(
        max_instances=999,
        memory_bytes=1 << 40,
        memory_overcommit=1.0,
        disk_floor_bytes=free.f_bavail * free.f_frsize - 64 * MIB,  # other programs may free space meanwhile
    )
    async with AsyncHost(
        fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, budgets=budgets, spares=0
    ) as host:
        names = [f"elm-{number}" for number in range(99)]  # 1.5 GiB of clones
        with pytest.raises(NoSpace, match="these 99 forks may write 1"):
            await fork(host, oak, *names, target=State.STOPPED)
        await assert_tidy(host, "oak")
