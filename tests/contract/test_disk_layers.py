"""Disks of forks are layers over their source's frozen files: nobody's writes reach another disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import NoSpace, VmmError
from coppice.host.admission import demand_of_activation
from coppice.machine import activate, disk, disks
from coppice.machine import directory as directories
from coppice.model import MIB, Instance, State
from coppice.requests import (
    ForkRequest,
    GetRequest,
    RestoreRequest,
    RmRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, fingerprint, make

pytestmark = pytest.mark.parametrize("personality", ["file", "anonymous"], indirect=True)  # the double needs raw disks


@pytest.fixture(autouse=True)
def without_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each file system behave as one without reflinks."""
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)


async def fork(host: AsyncHost, source: Instance, name: str, target: State = State.RUNNING, **options: Any) -> Instance:
    """Return one fork."""
    request = ForkRequest(instance=source.id, names=(name,), target=target, atomic=True, **options)
    return (await host.call(request)).instances[0]


async def frozen_files(host: AsyncHost, instance: Instance) -> dict[Path, tuple[int, int, int, str]]:
    """Return the fingerprints of the frozen files of a disk."""
    found = disks.paths(host.local.rooms.directory(instance.id), disks.of(instance))
    return {path: await asyncio.to_thread(fingerprint, path) for path in found if disk.frozen(path)}


async def test_each_machine_of_a_tree_has_its_own_disk(fake_host: AsyncHost) -> None:
    """Source, fork and fork of the fork write after the forks were made, and read only their own words."""
    oak = await make(fake_host, State.RUNNING)
    await ask(fake_host, oak, "save", "oak")
    oak = (await fake_host.call(StandbyRequest(instance=oak.id))).instance
    ash = await fork(fake_host, oak, "ash")
    assert disks.of(ash)[0].layers == (1,)
    kept = await frozen_files(fake_host, ash)
    assert await ask(fake_host, ash, "load") == "oak"
    await ask(fake_host, ash, "save", "ash")
    oak = await fake_host.call(RestoreRequest(instance=oak.id))
    assert disks.of(oak)[0].layers == (1,)
    assert await ask(fake_host, oak, "load") == "oak"
    await ask(fake_host, oak, "save", "later")
    ash = (await fake_host.call(StandbyRequest(instance=ash.id))).instance
    elm = await fork(fake_host, ash, "elm")
    assert (disks.of(elm)[0].layers, await ask(fake_host, elm, "load")) == ((1, 2), "ash")
    assert await ask(fake_host, oak, "load") == "later"
    assert await frozen_files(fake_host, ash) | kept == await frozen_files(fake_host, ash)
    assert (await fake_host.verify()).differences == ()
    await assert_tidy(fake_host, "oak", "ash", "elm")
    await fake_host.call(RmRequest(instance=oak.id))
    await fake_host.call(RmRequest(instance=ash.id))
    assert await ask(fake_host, elm, "load") == "ash"


@pytest.mark.parametrize("state", [State.STANDBY, State.TEMPLATE, State.STOPPED])
async def test_a_fork_writes_nothing_of_its_sources_disk(fake_host: AsyncHost, state: State) -> None:
    """However much the source has on its disk, a fork gets links and an empty layer."""
    oak = await make(fake_host, state)
    directory = fake_host.local.rooms.directory(oak.id)
    with (directory / "overlay.raw").open("r+b") as file:
        file.seek(MIB)
        file.write(b"\xa5" * 8 * MIB)
    if oak.capture is not None:  # as if the guest had written it
        stamped = msgspec.structs.replace(oak.capture, disk_stamp=directories.disk_stamp(directory, oak.disk_layers))
        fake_host.local.rooms.store.save(msgspec.structs.replace(oak, capture=stamped))
    target = State.STOPPED if state is State.STOPPED else State.STANDBY
    report = await fake_host.call(ForkRequest(instance=oak.id, names=("ash",), target=target, atomic=True))
    assert report.results[0].disk_bytes_written <= 64 << 10
    ash = report.instances[0]
    assert disk.allocated(disks.paths(fake_host.local.rooms.directory(ash.id), disks.of(ash))) >= 8 * MIB
    await assert_tidy(fake_host, "oak", "ash")


async def test_a_deep_tree_has_few_layers(fake_host: AsyncHost) -> None:
    """A fork that would have too many layers gets them merged, and keeps the content."""
    source = await make(fake_host, State.RUNNING, "g0")
    for level in range(1, disk.MOST + 4):
        await ask(fake_host, source, "save", f"level {level}")
        source = (await fake_host.call(StandbyRequest(instance=source.id))).instance
        source = await fork(fake_host, source, f"g{level}")
        assert len(disks.of(source)[0].layers) <= disk.MOST
        assert await ask(fake_host, source, "load") == f"level {level}"
    assert len(disks.of(source)[0].layers) < disk.MOST


async def test_a_machine_that_is_forked_and_started_again_has_few_layers(fake_host: AsyncHost) -> None:
    """Each start after a fork adds a layer, until they are merged; files that are not used are removed."""
    oak = await make(fake_host, State.STOPPED)
    for number in range(disk.MOST + 3):
        await fork(fake_host, oak, f"f{number}", State.STOPPED)
        oak = await fake_host.call(StartRequest(instance=oak.id))
        assert len(disks.of(oak)[0].layers) <= disk.MOST
        if number:
            assert await ask(fake_host, oak, "load") == f"turn {number - 1}"
        await ask(fake_host, oak, "save", f"turn {number}")
        oak = await fake_host.call(StopRequest(instance=oak.id, grace_s=0))
    await assert_tidy(fake_host, "oak", *(f"f{number}" for number in range(disk.MOST + 3)))


async def test_snapshots_of_layered_disks_are_restored(fake_host: AsyncHost) -> None:
    """A snapshot shares the files; the instance returns to it as often as wanted."""
    oak = await make(fake_host, State.RUNNING)
    await ask(fake_host, oak, "save", "first")
    oak = (await fake_host.call(StandbyRequest(instance=oak.id))).instance
    kept = await fake_host.call(SnapshotRequest(instance=oak.id, name="kept"))
    for _ in range(2):
        oak = await fake_host.call(RestoreRequest(instance=oak.id))
        assert await ask(fake_host, oak, "load") == "first"
        await ask(fake_host, oak, "save", "second")
        running = await fake_host.call(SnapshotRequest(instance=oak.id))
        assert disks.of(running)[0].layers == disks.of(oak)[0].layers
        oak = await fake_host.call(SnapshotRestoreRequest(snapshot=kept.id))
        assert oak.state is State.STANDBY
    await fake_host.call(SnapshotRestoreRequest(snapshot=running.id))
    assert await ask(fake_host, await fake_host.call(RestoreRequest(instance=oak.id)), "load") == "second"
    assert (await fake_host.verify()).differences == ()
    await assert_tidy(fake_host, "oak")


async def test_a_fork_of_a_running_layered_machine_has_the_disk_of_the_pause(fake_host: AsyncHost) -> None:
    """The topmost layer is copied, and the files below are linked."""
    oak = await make(fake_host, State.STANDBY)
    ash = await fork(fake_host, oak, "ash")
    await ask(fake_host, ash, "save", "then")
    elm = await fork(fake_host, ash, "elm", from_running=True)
    await ask(fake_host, ash, "save", "now")
    assert await ask(fake_host, elm, "load") == "then"
    raw = [fake_host.local.rooms.directory(each.id) / "overlay.raw" for each in (oak, ash, elm)]
    assert len({path.stat().st_ino for path in raw}) == 1
    await assert_tidy(fake_host, "oak", "ash", "elm")


async def test_a_disk_without_space_for_its_check_stops_no_other(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` reports that disk, and checks all others and their memory."""
    oak = await make(fake_host, State.STANDBY)
    ash, _ = [await fork(fake_host, oak, name, State.STANDBY) for name in ("ash", "elm")]
    full, flatten_disk = fake_host.local.rooms.directory(ash.id), driver.flatten_disk

    def flatten(base: Path, layers: Sequence[Path], out: Path) -> None:
        if base.parent == full:
            raise NoSpace("the disk is full", hint="see the test")
        flatten_disk(base, layers, out)

    monkeypatch.setattr(driver, "flatten_disk", flatten)
    report = await fake_host.verify()
    assert (report.no_space, report.skipped, report.differences) == (("ash",), (), ())
    assert (report.mem_files, report.disks) == (1, 2)
    await assert_tidy(fake_host, "oak", "ash", "elm")


async def test_a_failed_restore_keeps_the_capture(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A start that fails after the machine got a new layer loses neither memory nor disk."""
    oak = await make(fake_host, State.RUNNING)
    await ask(fake_host, oak, "save", "kept")
    oak = (await fake_host.call(StandbyRequest(instance=oak.id))).instance
    await fork(fake_host, oak, "ash", State.STANDBY)
    driver.faults.fail_at("restored")
    with pytest.raises(VmmError, match="planned"):
        await fake_host.call(RestoreRequest(instance=oak.id))
    (oak, _) = sorted(await assert_tidy(fake_host, "oak", "ash"), key=lambda each: each.name != "oak")
    assert oak.state is State.STANDBY
    assert await ask(fake_host, await fake_host.call(RestoreRequest(instance=oak.id)), "load") == "kept"


@pytest.mark.parametrize("state", [State.STOPPED, State.STANDBY])
async def test_a_start_cancelled_when_its_disk_is_recorded_keeps_the_disk(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """The layers were merged and recorded, and the old ones removed. The call that recorded that does not learn it."""
    oak = await make(fake_host, State.RUNNING)
    for number in range(3):
        await ask(fake_host, oak, "save", f"turn {number}")
        await fake_host.call((StandbyRequest if state is State.STANDBY else StopRequest)(instance=oak.id))
        oak = await fake_host.call(GetRequest(instance=oak.id))
        await fork(fake_host, oak, f"f{number}", state)
        if number < 2:
            oak = await fake_host.call((RestoreRequest if state is State.STANDBY else StartRequest)(instance=oak.id))
    monkeypatch.setattr(disk, "MOST", 2)  # an older version has left it as it is
    assert disks.are_full(oak)
    layers = disks.paths(fake_host.local.rooms.directory(oak.id), disks.of(oak))[1:]
    demand = demand_of_activation(fake_host.local.rooms, oak, boot=state is State.STOPPED)
    assert demand.clone_bytes >= disk.allocated(layers) > 0  # the start merges them
    original, loop = activate._own_disks, asyncio.get_running_loop()

    async def cancel() -> None:
        starting.cancel()

    def cancelled(*args: Any) -> Instance:
        owned = original(*args)
        asyncio.run_coroutine_threadsafe(cancel(), loop).result(10)
        return owned

    with monkeypatch.context() as patch:
        patch.setattr(activate, "_own_disks", cancelled)
        request = (RestoreRequest if state is State.STANDBY else StartRequest)(instance=oak.id)
        starting = asyncio.create_task(fake_host.call(request))
        with pytest.raises(asyncio.CancelledError):
            await starting
    oak = await fake_host.call(GetRequest(instance=oak.id))
    assert oak.state is state
    oak = await fake_host.call(request)
    assert await ask(fake_host, oak, "load") == "turn 2"
    await assert_tidy(fake_host, "oak", "f0", "f1", "f2")
