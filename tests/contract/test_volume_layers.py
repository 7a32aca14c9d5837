"""Layers of volumes: a fork with a clone copies nothing, and the volume's data outlives its writer, wherever it is."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from pathlib import Path

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import CoppiceError, HostCannot, NotFound
from coppice.machine import destroy, disk, disks
from coppice.machine import volumes as attached
from coppice.model import Instance, State, Volume
from coppice.requests import (
    ForkRequest,
    GetRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from coppice.state.volumes import VolumeStore
from coppice.volumes import ext4
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.hosting import ask, assert_tidy, fingerprint
from fakes.rooms import IMAGE
from fakes.volumes import READS, SIZE, WRITES, at, got, got_of_volume, own_link, put, with_volume

pytestmark = pytest.mark.parametrize("personality", ["file"], indirect=True)


@pytest.fixture(autouse=True)
def without_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each file system behave as one without reflinks."""
    monkeypatch.setattr(disk, "reflink_file", lambda *_, **__: False)


async def make_writer(host: AsyncHost) -> Instance:
    """Return a Running `oak` with the volume `data` on which it has written `warm`."""
    await host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(host, WRITES)
    put(host, oak, "warm")
    return oak


async def fork(host: AsyncHost, name: str, source: str = "oak", target: State = State.STOPPED) -> Instance:
    """Return a fork of a machine in any state, with a clone."""
    running = (await host.call(GetRequest(instance=source))).state is State.RUNNING
    request = ForkRequest(
        instance=source, names=(name,), target=target, from_running=running, volume_policy="clone", atomic=True
    )
    return (await host.call(request)).instances[0]


@pytest.mark.parametrize("state", [State.RUNNING, State.STANDBY, State.STOPPED])
async def test_a_clone_is_a_layer_over_the_frozen_volume(fake_host: AsyncHost, state: State) -> None:
    """Nothing of the volume's data is written. The source goes on in a layer of its own when it runs."""
    oak = await make_writer(fake_host)
    if state is not State.RUNNING:
        await fake_host.call((StandbyRequest if state is State.STANDBY else StopRequest)(instance="oak"))
    raw = own_link(fake_host, oak)
    request = ForkRequest(
        instance="oak",
        names=("elm", "fir"),
        count=2,
        target=State.STOPPED,
        from_running=state is State.RUNNING,
        volume_policy="clone",
        atomic=True,
    )
    report = await fake_host.call(request)
    frozen = await asyncio.to_thread(fingerprint, raw)
    for result in report.results:
        assert result.disk_bytes_written <= 128 << 10
        assert result.instance is not None
        assert own_link(fake_host, result.instance).samefile(raw)
        put(fake_host, result.instance, result.name)
    if state is not State.RUNNING:
        await fake_host.call((RestoreRequest if state is State.STANDBY else StartRequest)(instance="oak"))
    put(fake_host, oak, "on")
    oak, elm, fir = await assert_tidy(fake_host, "oak", "elm", "fir")
    assert oak.disk_layers["volume0"] == (1,)
    assert [got(fake_host, each) for each in (oak, elm, fir)] == ["on", "elm", "fir"]
    assert await asyncio.to_thread(fingerprint, raw) == frozen
    assert (await fake_host.volumes.inspect("data")).disk_bytes > raw.stat().st_blocks * 512
    await fake_host.call(StandbyRequest(instance="oak"))
    assert (await fake_host.verify()).differences == ()


async def test_all_disks_are_switched_together(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """One order in the pause switches the overlay and each volume that is written to."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    await fake_host.volumes.create("cache", size_bytes=SIZE)
    await fake_host.volumes.create("models", size_bytes=SIZE)
    mounts = (at("/data"), at("/models", "models", readonly=True), at("/cache", "cache"))
    oak = await with_volume(fake_host, mounts)
    for name in ("overlay", "volume0", "volume2"):
        await ask(fake_host, "oak", "save", f"{name} warm", name)
    elm = await fork(fake_host, "elm", target=State.RUNNING)
    assert driver.faults.reached["switch_layers"] == 1
    assert (await fake_host.call(GetRequest(instance="oak"))).disk_layers == dict.fromkeys(
        ("overlay", "volume0", "volume2"), (1,)
    )
    for name in ("overlay", "volume0", "volume2"):
        await ask(fake_host, "oak", "save", "later", name)
        assert await ask(fake_host, "elm", "load", name) == f"{name} warm"
    assert own_link(fake_host, elm, 1).samefile(own_link(fake_host, oak, 1))
    await assert_tidy(fake_host, "oak", "elm")


async def test_the_volume_gets_its_layers_back(fake_host: AsyncHost) -> None:
    """After its writer was removed, the volume has what it wrote last. The next writer goes on with it."""
    oak = await make_writer(fake_host)
    await fork(fake_host, "elm")
    put(fake_host, oak, "later")
    await fake_host.call(RmRequest(instance="oak"))
    assert (await fake_host.volumes.inspect("data")).volume.layers == (1,)
    assert got_of_volume(fake_host) == "later"
    assert (await fake_host.verify()).differences == ()
    ash = await with_volume(fake_host, WRITES, "ash")
    assert ash.disk_layers == {"volume0": (1,)}
    assert got(fake_host, ash) == "later"
    put(fake_host, ash, "ash")
    await fork(fake_host, "fir", "ash")
    put(fake_host, ash, "last")
    await fake_host.call(RmRequest(instance="ash"))
    assert (await fake_host.volumes.inspect("data")).volume.layers == (1, 2)
    assert got_of_volume(fake_host) == "last"
    elm, fir = await assert_tidy(fake_host, "elm", "fir")
    assert [got(fake_host, each) for each in (elm, fir)] == ["warm", "ash"]
    await fake_host.volumes.rm("data")
    assert [got(fake_host, each) for each in (elm, fir)] == ["warm", "ash"]


async def test_a_volume_that_only_clones_share_is_not_written_to(fake_host: AsyncHost) -> None:
    """A writer that was forked at rest and removed leaves a frozen file. The next one gets a layer over it."""
    await make_writer(fake_host)
    await fake_host.call(StopRequest(instance="oak"))
    elm = await fork(fake_host, "elm")
    await fake_host.call(RmRequest(instance="oak"))
    assert (await fake_host.volumes.inspect("data")).volume.layers == ()
    ash = await with_volume(fake_host, WRITES, "ash")
    assert ash.disk_layers == {"volume0": (1,)}
    put(fake_host, ash, "ash")
    assert got(fake_host, elm) == "warm"
    await fake_host.call(RmRequest(instance="ash"))
    await fake_host.call(RmRequest(instance="elm"))
    assert got_of_volume(fake_host) == "ash"
    await assert_tidy(fake_host)


async def test_readers_get_one_raw_file(fake_host: AsyncHost) -> None:
    """The layers are merged into a new file before the first reader; clones keep the old ones."""
    oak = await make_writer(fake_host)
    elm = await fork(fake_host, "elm")
    put(fake_host, oak, "later")
    await fake_host.call(RmRequest(instance="oak"))
    readers = await asyncio.gather(*(with_volume(fake_host, READS, name) for name in ("ash", "fir")))
    volume = (await fake_host.volumes.inspect("data")).volume
    assert (volume.layers, volume.driver) == ((), "")
    for each in readers:
        assert own_link(fake_host, each).samefile(fake_host.local.rooms.layout.volume_disk(volume.id))
    assert got_of_volume(fake_host) == "later"
    assert got(fake_host, elm) == "warm"
    await assert_tidy(fake_host, "ash", "elm", "fir")
    for each in readers:
        await fake_host.call(RmRequest(instance=each.id))
    await with_volume(fake_host, WRITES, "next")
    await assert_tidy(fake_host, "elm", "next")


@pytest.mark.parametrize("layered", [True, False], ids=["layers", "a frozen file"])
async def test_a_vmm_without_layers_gets_a_file_of_its_own(
    fake_host: AsyncHost, fake_vmm: Path, fake_home: Path, layered: bool
) -> None:
    """It can neither read layers, nor put one over a file that clones share."""
    raw_only = FakeDriver(
        fake_vmm,
        name="raw",
        capabilities=msgspec.structs.replace(CAPABILITIES, layer_format="", switches_layers=False),
    )
    chosen = fake_host.local.rooms.drivers.chosen
    fake_host.local.rooms.drivers.choose(raw_only)
    fake_host.local.rooms.drivers.choose(chosen)
    try:
        oak = await make_writer(fake_host)
        if not layered:
            await fake_host.call(StopRequest(instance="oak"))
        elm = await fork(fake_host, "elm")
        if layered:
            put(fake_host, oak, "later")
        await fake_host.call(RmRequest(instance="oak"))
        ash = await fake_host.call(RunRequest(image=IMAGE, name="ash", volumes=WRITES, vmm="raw"))
        assert ash.disk_layers == {}
        assert got(fake_host, ash) == ("later" if layered else "warm")
        put(fake_host, ash, "ash")
        assert got(fake_host, elm) == "warm"
        await fake_host.call(RmRequest(instance="ash"))
        assert got_of_volume(fake_host) == "ash"
    finally:
        await raw_only.end(fake_home / "instances")


async def test_the_journal_of_a_frozen_volume_is_replayed(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clones are gone, so nothing else has the file. A user who is not root could not write to it as it is."""
    await make_writer(fake_host)
    await fake_host.call(StopRequest(instance="oak"))
    await fork(fake_host, "elm")
    for name in ("oak", "elm"):
        await fake_host.call(RmRequest(instance=name))
    raw = fake_host.local.rooms.layout.volume_disk((await fake_host.volumes.inspect("data")).volume.id)
    assert disk.frozen(raw)
    replayed: list[bool] = []

    def replay(path: Path) -> bool:
        replayed.append(disk.frozen(path))
        return True

    monkeypatch.setattr(ext4, "needs_recovery", lambda _: not replayed)
    monkeypatch.setattr(ext4, "replay_journal", replay)
    ash = await with_volume(fake_host, READS, "ash")
    assert replayed == [False]
    assert disk.frozen(own_link(fake_host, ash))


async def test_many_forks_leave_few_layers(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of the volume are merged as those of the overlay are; each clone keeps its content."""
    monkeypatch.setattr(disk, "MOST", 3)
    oak = await make_writer(fake_host)
    names = [f"f{number}" for number in range(6)]
    for name in names:
        put(fake_host, oak, name)
        await fork(fake_host, name)
        oak = await fake_host.call(GetRequest(instance="oak"))
        assert all(len(each.layers) <= 3 for each in disks.of(oak))
    put(fake_host, oak, "end")
    forks = await assert_tidy(fake_host, "oak", *names)
    assert [got(fake_host, each) for each in forks] == ["end", *names]
    await fake_host.call(RmRequest(instance="oak"))
    assert got_of_volume(fake_host) == "end"
    await assert_tidy(fake_host, *names)


STEPS = ("disks_in_use", "prepare_switch", "switch_layers", "switched", "finish_switch", "save", "replace_below")


@pytest.mark.parametrize("dies", [False, True], ids=["fails", "dies"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_failure_at_any_step_loses_no_write(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, step: str, dies: bool
) -> None:
    """The guest runs on, or, if its VMM died, the volume has all that it had written."""
    monkeypatch.setattr(disk, "MOST", 2)
    await make_writer(fake_host)
    for name in ("f0", "f1"):
        await fork(fake_host, name)
    await ask(fake_host, "oak", "save", "before", "volume0")
    (driver.faults.die_at if dies else driver.faults.fail_at)(step)
    with pytest.raises(CoppiceError):
        await fork(fake_host, "elm")
    oak = await fake_host.call(GetRequest(instance="oak"))
    assert oak.state is (State.STOPPED if dies else State.RUNNING)
    await assert_tidy(fake_host, "oak", "f0", "f1")
    if not dies:
        await ask(fake_host, "oak", "save", "after", "volume0")
    await fake_host.call(RmRequest(instance="oak"))
    assert got_of_volume(fake_host) == ("before" if dies else "after")
    assert (await fake_host.verify()).differences == ()


@pytest.mark.parametrize("came", ["begun", "linked", "recorded", "given back", "removed"])
async def test_an_interrupted_removal_loses_no_layer(
    fake_host: AsyncHost, make_host: HostFactory, dead_store: Store, monkeypatch: pytest.MonkeyPatch, came: str
) -> None:
    """Whatever step a killed process came to, the next one gives the volume the latest layers."""
    oak = await make_writer(fake_host)
    await fork(fake_host, "elm")
    put(fake_host, oak, "later")
    await fake_host.call(StopRequest(instance="oak", grace_s=0))
    oak = await fake_host.call(GetRequest(instance="oak"))
    dead_store.begin(oak, JournalOperation.REMOVE)
    rooms = fake_host.local.rooms

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if came == "linked":
            patch.setattr(VolumeStore, "save", kill)
        if came == "recorded":
            save = VolumeStore.save
            patch.setattr(VolumeStore, "save", lambda store, volume: kill(save(store, volume)))
        if came in ("linked", "recorded"):
            with pytest.raises(Killed):
                attached.give_back(rooms, oak)
        if came == "given back":
            attached.give_back(rooms, oak)
        if came == "removed":
            patch.setattr(Store, "forget", kill)
            with pytest.raises(Killed):
                destroy._forget(rooms, oak)
    async with make_host() as next_host:
        (elm,) = await assert_tidy(next_host, "elm")
        assert got_of_volume(next_host) == "later"
        assert got(next_host, elm) == "warm"
        assert (await next_host.verify()).differences == ()


async def test_a_writer_whose_layer_has_too_many_links_stays(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says that forks must go first. The removal can be repeated, and no data is lost."""
    oak = await make_writer(fake_host)
    await fork(fake_host, "elm")
    put(fake_host, oak, "later")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(HostCannot, match="Too many links") as caught:
            await fake_host.call(RmRequest(instance="oak"))
    assert "remove forks of it first" in str(caught.value.hint)
    with pytest.raises(NotFound):  # the journal has the removal, so the next look at it completes it
        await fake_host.call(GetRequest(instance="oak"))
    assert got_of_volume(fake_host) == "later"
    await assert_tidy(fake_host, "elm")


async def test_layers_are_durable_before_they_are_recorded(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the record finds each layer, and the name that leads to it."""
    synced: dict[int, set[str]] = {}  # by inode: the names in a directory when it was last synced
    fsync, save = os.fsync, VolumeStore.save

    def note(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = set(os.listdir(descriptor)) if stat.S_ISDIR(status.st_mode) else set()

    saved: list[Volume] = []

    def check(store: VolumeStore, volume: Volume) -> None:
        directory = fake_host.local.rooms.layout.volume(volume.id)
        raw, *layers = attached.disk_of(volume).paths(directory)
        assert {raw.name, *(path.name for path in layers)} <= synced[directory.stat().st_ino]
        assert all(path.stat().st_ino in synced for path in layers)
        saved.append(volume)
        save(store, volume)

    monkeypatch.setattr(os, "fsync", note)
    oak = await make_writer(fake_host)
    await fork(fake_host, "elm")
    put(fake_host, oak, "later")
    monkeypatch.setattr(VolumeStore, "save", check)
    await fake_host.call(RmRequest(instance="oak"))
    assert [volume.layers for volume in saved] == [(1,)]


async def test_a_machine_that_could_not_be_placed_leaves_the_layers(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record names the volume's layers before it has links to them; its removal takes none away."""
    oak = await make_writer(fake_host)
    await fork(fake_host, "elm")
    put(fake_host, oak, "later")
    await fake_host.call(RmRequest(instance="oak"))

    def fail(*_: object, **__: object) -> None:
        raise HostCannot("planned", hint="see the test")

    for module, name in ((attached, "link"), (disk, "_put_layer")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            if module is disk:
                patch.setattr(disk, "is_frozen", lambda *_: True)
            with pytest.raises(HostCannot, match="planned"):
                await with_volume(fake_host, WRITES, "ash")
        await assert_tidy(fake_host, "elm")
        assert got_of_volume(fake_host) == "later"
    await with_volume(fake_host, WRITES, "ash")
    await assert_tidy(fake_host, "ash", "elm")


async def test_verify_finds_a_damaged_layer_of_a_volume(fake_host: AsyncHost) -> None:
    """A volume without a writer is checked with its layers."""
    oak = await make_writer(fake_host)
    await fork(fake_host, "elm")
    put(fake_host, oak, "later")
    await fake_host.call(RmRequest(instance="oak"))
    volume = (await fake_host.volumes.inspect("data")).volume
    top = attached.disk_of(volume).paths(fake_host.local.rooms.layout.volume(volume.id))[-1]
    with top.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 65536)
    (difference,) = (await fake_host.verify()).differences
    assert (difference.holder, difference.name, difference.file) == ("volume", "data", "data.raw")
    top.unlink()
    (difference,) = (await fake_host.verify()).differences
    assert difference.detail == "it is missing"


@pytest.mark.parametrize("order", [("oak", "elm", "fir"), ("elm", "oak", "fir"), ("fir", "elm", "oak")])
async def test_machines_are_removed_in_any_order(fake_host: AsyncHost, order: tuple[str, ...]) -> None:
    """A fork of a fork keeps its data without its ancestors."""
    await make_writer(fake_host)
    elm = await fork(fake_host, "elm", target=State.RUNNING)
    put(fake_host, elm, "elm")
    await fork(fake_host, "fir", "elm")
    expected = {"oak": "warm", "elm": "elm", "fir": "elm"}
    for name in order:
        assert {each.name: got(fake_host, each) for each in fake_host.local.rooms.store.instances()} == expected
        await fake_host.call(RmRequest(instance=name))
        del expected[name]
        await assert_tidy(fake_host, *expected)
    assert got_of_volume(fake_host) == "warm"
