"""A machine that is captured while it runs goes on in a new layer of its disk: nothing is copied, and no write is lost."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import CoppiceError
from coppice.machine import disk, disks
from coppice.model import Instance, SnapshotKind, State
from coppice.requests import (
    ForkRequest,
    GetRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, fingerprint

switching = pytest.mark.parametrize("personality", ["file", "anonymous"], indirect=True)
once = pytest.mark.parametrize("personality", ["file"], indirect=True)


async def live_fork(host: AsyncHost, name: str, target: State = State.STOPPED) -> Instance:
    """Return a fork of the running oak."""
    request = ForkRequest(instance="oak", names=[name], from_running=True, target=target, atomic=True)
    return (await host.call(request)).instances[0]


async def get(host: AsyncHost, name: str = "oak") -> Instance:
    """Return an instance's record in its true state."""
    return await host.call(GetRequest(instance=name))


async def load(host: AsyncHost, name: str) -> str:
    """Return the text on the disk of a stopped machine."""
    await host.call(StartRequest(instance=name))
    return await ask(host, name, "load")


async def assert_writes_survive(host: AsyncHost, expected: str) -> None:
    """Assert that oak has a text on its disk, and keeps another one in each way to go on."""
    if (await get(host)).state is State.STOPPED:
        await host.call(StartRequest(instance="oak"))
    assert await ask(host, "oak", "load") == expected
    await ask(host, "oak", "save", "later")
    elm = await live_fork(host, "elm")
    await ask(host, "oak", "save", "latest")
    await host.call(StandbyRequest(instance="oak"))
    await host.call(RestoreRequest(instance="oak"))
    assert await ask(host, "oak", "load") == "latest"
    await host.call(StopRequest(instance="oak", grace_s=0))
    assert await load(host, "oak") == "latest"
    assert await load(host, elm.name) == "later"
    await assert_tidy(host, "oak", "elm")


@switching
@pytest.mark.parametrize("kind", list(SnapshotKind))
async def test_nothing_of_the_disk_is_copied(fake_host: AsyncHost, kind: SnapshotKind) -> None:
    """The file that the source wrote to is frozen and linked, for a fork and for a snapshot of both kinds."""
    oak = await boot(fake_host)
    await ask(fake_host, "oak", "save", "then")
    directory = fake_host.local.rooms.directory(oak.id)
    (raw,) = disks.paths(directory, disks.of(oak))
    before = raw.stat().st_ino
    elm = await live_fork(fake_host, "elm", State.RUNNING)
    frozen = await asyncio.to_thread(fingerprint, raw)
    assert (frozen[0], frozen[1] & 0o777) == (before, 0o444)
    own = disks.paths(fake_host.local.rooms.directory(elm.id), disks.of(elm))
    oak = await get(fake_host)
    assert disks.of(oak)[0].layers == (1,)
    await ask(fake_host, "oak", "save", "noon")
    kept = await fake_host.call(SnapshotRequest(instance="oak", kind=kind))
    assert (disks.of(kept)[0].layers, disks.of(await get(fake_host))[0].layers) == ((1,), (1, 2))
    for path in disks.paths(fake_host.local.rooms.layout.snapshot(kept.id), disks.of(kept)):
        assert path.samefile(directory / path.name)
    await ask(fake_host, "oak", "save", "evening")
    await fake_host.call(SnapshotForkRequest(snapshot=kept.id, names=["ash"], atomic=True))
    assert [await ask(fake_host, name, "load") for name in ("elm", "ash", "oak")] == ["then", "noon", "evening"]
    assert own[0].read_bytes()[-4096:].startswith(b"then")
    assert await asyncio.to_thread(fingerprint, raw) == frozen
    await fake_host.call(StandbyRequest(instance="oak"))
    assert (await fake_host.verify()).differences == ()
    await assert_tidy(fake_host, "oak", "elm", "ash")


@pytest.mark.parametrize("personality", ["firecracker"], indirect=True)
async def test_without_the_capability_the_disk_is_copied(fake_host: AsyncHost) -> None:
    """The source keeps its file, and may write to it."""
    oak = await boot(fake_host)
    await ask(fake_host, "oak", "save", "then")
    elm = await live_fork(fake_host, "elm")
    raw, copy = (fake_host.local.rooms.directory(each.id) / "overlay.raw" for each in (oak, elm))
    assert not copy.samefile(raw)
    assert not disk.frozen(raw)
    assert disks.of(await get(fake_host))[0].layers == disks.of(elm)[0].layers == ()
    await ask(fake_host, "oak", "save", "now")
    assert await load(fake_host, "elm") == "then"
    assert await ask(fake_host, "oak", "load") == "now"


@switching
async def test_many_captures_leave_few_layers(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, driver: FakeDriver
) -> None:
    """The layers below the topmost one are merged while the machine runs, and each fork keeps its content."""
    monkeypatch.setattr(disk, "MOST", 3)
    await boot(fake_host)
    names = [f"f{number}" for number in range(9)]
    for name in names:
        await ask(fake_host, "oak", "save", name)
        await live_fork(fake_host, name)
        assert len(disks.of(await get(fake_host))[0].layers) <= 3
        assert await ask(fake_host, "oak", "load") == name
    assert driver.faults.reached["replace_below"] >= 2
    for name in names[::4]:
        assert await load(fake_host, name) == name
    await assert_tidy(fake_host, "oak", *names)


@once
async def test_the_record_names_a_layer_before_the_vmm_writes_to_it(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """If host and VMM are lost after a switch, the next start finds what the guest wrote since."""
    oak = await boot(fake_host)
    switched = driver.faults.hold_at("switched")
    forking = asyncio.create_task(live_fork(fake_host, "elm"))
    async with asyncio.timeout(30):
        await switched.reached.wait()
    recorded, entry = fake_host.local.rooms.store.get_journaled(oak.id)
    assert disks.of(recorded)[0].layers == (1,)
    assert entry is not None
    assert entry.operation is JournalOperation.FORK_RUNNING
    switched.release.set()
    assert disks.of(await forking)[0].layers == (1,)  # its own one, over the frozen file
    assert disks.of(await get(fake_host))[0].layers == (1,)


STEPS = (
    *("disks_in_use", "prepare_switch", "switch_layers", "switched", "finish_switch"),
    *("save", "replace_below", "replaced"),
)


@once
@pytest.mark.parametrize("dies", [False, True], ids=["fails", "dies"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_failure_at_any_step_loses_no_write(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, step: str, dies: bool
) -> None:
    """The guest runs on, or, if its VMM died, its disk has all that it had written, and the record names all files."""
    monkeypatch.setattr(disk, "MOST", 2)
    await boot(fake_host)
    for name in ("f0", "f1"):
        await live_fork(fake_host, name)
    await ask(fake_host, "oak", "save", "before")
    (driver.faults.die_at if dies else driver.faults.fail_at)(step)
    with pytest.raises(CoppiceError):
        await live_fork(fake_host, "elm")
    oak = await get(fake_host)
    assert oak.state is (State.STOPPED if dies else State.RUNNING)
    await assert_tidy(fake_host, "oak", "f0", "f1")
    expected = "before"
    if not dies:
        await ask(fake_host, "oak", "save", "after")
        expected = "after"
        await fake_host.call(StopRequest(instance="oak", grace_s=0))
    assert await load(fake_host, "oak") == expected


@once
async def test_a_vmm_that_did_not_switch_is_asked_again(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the VMM could not be asked after a failure, the record has a layer too many. No file that the
    VMM writes to is frozen by the next capture.
    """
    oak = await boot(fake_host)
    await ask(fake_host, "oak", "save", "before")
    driver.faults.fail_at("switch_layers")
    driver.faults.fail_at("disks_in_use", nth=2)  # the first one prepares
    with pytest.raises(CoppiceError):
        await live_fork(fake_host, "elm")
    oak = await get(fake_host)
    assert (oak.state, disks.of(oak)[0].layers) == (State.RUNNING, (1,))
    await ask(fake_host, "oak", "save", "unswitched")
    await assert_writes_survive(fake_host, "unswitched")


@once
@pytest.mark.parametrize("lives", [True, False], ids=["the VMM lives", "the VMM died"])
@pytest.mark.parametrize("came", ["layer", "record", "switch"])
async def test_a_host_that_was_killed_in_a_switch_loses_no_write(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store, came: str, lives: bool
) -> None:
    """Whatever step it came to, the machine's disk has what its guest wrote before and after the kill."""
    oak = await boot(fake_host)
    await ask(fake_host, "oak", "save", "before")
    rooms, directory = fake_host.local.rooms, fake_host.local.rooms.directory(oak.id)
    dead_store.begin(oak, JournalOperation.FORK_RUNNING)
    (overlay,) = disks.of(oak)
    overlay = disk.add_layer(directory, overlay, rooms.driver(oak), rooms.overlays)
    if came != "layer":
        dead_store.save(msgspec.structs.replace(oak, disk_layers=disks.recorded([overlay])))
    if came == "switch":
        await driver.prepare_switch(directory, overlay.files)
        await driver.pause(directory)
        await driver.switch_layers(directory, [overlay.files])
        await driver.resume(directory)
    assert oak.vmm is not None
    if lives:
        await ask(fake_host, "oak", "save", "after the kill")
    else:
        await driver.quit(directory, oak.vmm)
    async with make_host() as next_host:
        (oak,) = await assert_tidy(next_host, "oak")
        assert oak.state is (State.RUNNING if lives else State.STOPPED)
        if lives:
            assert disks.of(oak)[0].layers == (overlay.layers if came == "switch" else ())
        await assert_writes_survive(next_host, "after the kill" if lives else "before")


@once
@pytest.mark.parametrize("lives", [True, False], ids=["the VMM lives", "the VMM died"])
@pytest.mark.parametrize("came", ["merged", "replaced"])
async def test_a_host_that_was_killed_in_a_merge_loses_no_write(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store, came: str, lives: bool
) -> None:
    """The files that the VMM uses stay until it has ended, recorded or not."""
    await boot(fake_host)
    for name in ("f0", "f1", "f2"):
        await ask(fake_host, "oak", "save", name)
        await live_fork(fake_host, name)
        await fake_host.call(RmRequest(instance=name))
    oak = await get(fake_host)
    rooms, directory = fake_host.local.rooms, fake_host.local.rooms.directory(oak.id)
    dead_store.begin(oak, JournalOperation.FORK_RUNNING)
    overlay = disk.merge_below(directory, disks.of(oak)[0], rooms.driver(oak))
    assert overlay.layers == (4, 3)
    if came == "replaced":
        await driver.replace_below(directory, overlay.files)
    assert oak.vmm is not None
    if not lives:
        await driver.quit(directory, oak.vmm)
    async with make_host() as next_host:
        (oak,) = await assert_tidy(next_host, "oak")
        assert disks.of(oak)[0].layers == (overlay.layers if lives and came == "replaced" else (1, 2, 3))
        await assert_writes_survive(next_host, "f2")
