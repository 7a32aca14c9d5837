"""Volumes: one machine writes or any number read, and a fork never makes a second writer."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import HostCannot, ImageError, IntegrityError, NameTaken, NoSpace, NotFound, UnsafePath, UsageError
from coppice.model import MIB, Attachment, Budgets, SnapshotKind, State, VolumeMount
from coppice.names import MAX_VOLUME
from coppice.requests import (
    ForkRequest,
    GetRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.vmm import driver as files
from coppice.volumes.ext4 import fsck
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, snapshot
from fakes.rooms import DEADLINES, open_rooms
from fakes.volumes import READS, SIZE, WRITES, at, own_link, refused, with_volume
from image_archives import file, tar

# The disk


async def test_a_volume_is_an_empty_file_system_of_its_size(fake_host: AsyncHost) -> None:
    """It is clean, sparse, readable by its owner only, and found by name and by id,
    with its tags.
    """
    made = await fake_host.volumes.create("data", size_bytes=64 * MIB, tags={"for": "tests"})
    disk = fake_host.local.rooms.layout.volume_disk(made.id)
    assert (await asyncio.to_thread(fsck, disk)).clean
    found = await fake_host.volumes.inspect("data")
    assert found == await fake_host.volumes.inspect(made.id)
    assert (found.volume, found.link_count) == (made, 1)
    assert (disk.stat().st_size, stat.S_IMODE(disk.stat().st_mode)) == (64 * MIB, 0o600)
    assert 0 < found.disk_bytes < 2 * MIB
    assert await fake_host.volumes.ls(tags={"for": "tests"}) == [made]
    assert await fake_host.volumes.ls(tags={"for": "others"}) == []
    await assert_tidy(fake_host)


async def test_names_and_sizes_are_checked_before_anything_is_made(fake_host: AsyncHost) -> None:
    """A taken or invalid name and an impossible size leave nothing."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    before = snapshot(fake_host)
    for name, size, error in (
        ("data", SIZE, NameTaken),
        ("../data", SIZE, UsageError),
        ("small", MIB, UsageError),
        ("odd", SIZE + 1, UsageError),
        ("huge", 1 << 60, UsageError),
    ):
        with pytest.raises(error):
            await fake_host.volumes.create(name, size_bytes=size)
    assert snapshot(fake_host) == before


async def test_a_volume_that_does_not_fit_is_refused(driver: FakeDriver, fake_home: Path) -> None:
    """The metadata of an empty file system must fit above the floor."""
    disk = os.statvfs(fake_home)
    budgets = Budgets(
        max_instances=9,
        memory_bytes=1 << 40,
        memory_overcommit=1.0,
        disk_floor_bytes=disk.f_bavail * disk.f_frsize - 64 * MIB,  # other programs may free space meanwhile
    )
    async with AsyncHost(
        fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, budgets=budgets, spares=0
    ) as host:
        with pytest.raises(NoSpace, match="the volume data"):
            await host.volumes.create("data", size_bytes=MAX_VOLUME)
        await assert_tidy(host)


async def test_a_volume_starts_with_an_archive(fake_host: AsyncHost, tmp_path: Path) -> None:
    """The volume is clean and can be used like any other.

    An archive that is invalid or does not fit leaves nothing.
    """
    archive = tmp_path / "data.tar"
    archive.write_bytes(tar(file("dir/note", b"from the archive", uid=7)))
    made = await fake_host.volumes.create("data", size_bytes=SIZE, archive=archive)
    disk = fake_host.local.rooms.layout.volume_disk(made.id)
    assert (await asyncio.to_thread(fsck, disk)).clean
    assert b"from the archive" in disk.read_bytes()
    assert (await fake_host.volumes.inspect("data")).volume == made
    await assert_tidy(fake_host)
    before = snapshot(fake_host)
    for content, error in (
        (tar(file("../note")), UnsafePath),
        (tar(file("note", b"x" * 9000))[:5000], ImageError),
        (b"no archive", ImageError),
        (tar(file("large", os.urandom(SIZE))), UsageError),
    ):
        archive.write_bytes(content)
        with pytest.raises(error):
            await fake_host.volumes.create("other", size_bytes=SIZE, archive=archive)
        assert snapshot(fake_host) == before
    with pytest.raises(UsageError, match="does not exist"):
        await fake_host.volumes.create("other", size_bytes=SIZE, archive=tmp_path / "missing")
    assert snapshot(fake_host) == before


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


async def test_a_cancelled_creation_leaves_no_volume(fake_host: AsyncHost, tmp_path: Path) -> None:
    """A creation that is cancelled while the volume is filled ends at once, and leaves nothing."""
    archive = tmp_path / "data.tar"
    archive.write_bytes(tar(*(file(f"{number}", b"x") for number in range(400))))
    before = snapshot(fake_host)
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    made = asyncio.create_task(
        fake_host.volumes.create("data", size_bytes=SIZE, archive=archive, progress=lambda _: _wake(loop, begun))
    )
    await begun.wait()
    made.cancel()
    with pytest.raises(asyncio.CancelledError):
        await made
    assert snapshot(fake_host) == before
    await assert_tidy(fake_host)


# Attaching


async def test_an_instance_has_its_own_links_and_mounts(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Links are in the given order and mounts from outer to inner paths.

    A link is writable only if the instance writes, and then by its VMM's group at most.
    """
    for name in ("data", "models"):
        await fake_host.volumes.create(name, size_bytes=SIZE)
    oak = await with_volume(fake_host, (at("/srv/data/sub"), at("/srv/data", "models", readonly=True)))
    directory = fake_host.local.rooms.directory(oak.id)
    for number, (name, modes) in enumerate((("data", {0o600, 0o660}), ("models", {0o444}))):
        volume = (await fake_host.volumes.inspect(name)).volume
        own = own_link(fake_host, oak, number)
        assert own.samefile(fake_host.local.rooms.layout.volume_disk(volume.id))
        assert stat.S_IMODE(own.stat().st_mode) in modes
    assert driver.guest_state(directory).mounts == ("1 ro /srv/data", "0 rw /srv/data/sub")
    (attached,) = (await fake_host.volumes.inspect("models")).volume.attachments
    assert attached == Attachment(
        holder="instance", instance_id=oak.id, name="oak", mount_path="/srv/data", readonly=True
    )
    await assert_tidy(fake_host, "oak")


async def test_written_data_outlives_the_instance(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """`rm` makes the guest write out its data, and the next instance finds it in the volume."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(fake_host, WRITES)
    with own_link(fake_host, oak).open("r+b") as disk:
        disk.seek(SIZE - 4096)
        disk.write(b"left by oak")
    synced = driver.faults.reached["sync"]
    await fake_host.call(RmRequest(instance=oak.id))
    assert driver.faults.reached["sync"] == synced + 1
    ash = await with_volume(fake_host, WRITES, "ash")
    assert b"left by oak" in own_link(fake_host, ash).read_bytes()
    await assert_tidy(fake_host, "ash")


async def test_one_instance_writes_or_any_number_read(fake_host: AsyncHost) -> None:
    """The holder counts in every state. The refusal names it, and comes before any side effect."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    await with_volume(fake_host, WRITES)
    for state in (State.RUNNING, State.STANDBY, State.STOPPED):
        if state is State.STANDBY:
            await fake_host.call(StandbyRequest(instance="oak"))
        if state is State.STOPPED:
            await fake_host.call(RestoreRequest(instance="oak"))
            await fake_host.call(StopRequest(instance="oak"))
        await refused(fake_host, with_volume(fake_host, WRITES, "ash"), "oak has it for writing")
        await refused(fake_host, with_volume(fake_host, READS, "ash"), "oak has it for writing")
        await refused(fake_host, fake_host.volumes.rm("data"), "oak has it for writing")
    await fake_host.call(RmRequest(instance="oak"))
    await with_volume(fake_host, READS, "elm")
    await with_volume(fake_host, READS, "fir")
    error = await refused(fake_host, with_volume(fake_host, WRITES, "ash"), "elm, fir have it")
    assert "read-only" in (error.hint or "")
    await refused(fake_host, fake_host.volumes.rm("data"), "elm, fir have it")
    await fake_host.call(RmRequest(instance="elm"))
    await fake_host.call(RmRequest(instance="fir"))
    await with_volume(fake_host, WRITES, "ash")
    await fake_host.call(RmRequest(instance="ash"))
    await fake_host.volumes.rm("data")
    await assert_tidy(fake_host)


async def test_an_invalid_attachment_leaves_nothing(fake_host: AsyncHost) -> None:
    """An unknown volume, a reserved path, a path or volume given twice, or too many volumes."""
    data = await fake_host.volumes.create("data", size_bytes=SIZE)
    before = snapshot(fake_host)
    for volumes, error in (
        ((at("/data", "nothing"),), NotFound),
        ((at("/proc/data"),), UsageError),
        ((at("/a"), at("/a", "data", readonly=True)), UsageError),
        ((at("/a"), at("/b", data.id)), UsageError),
        (tuple(at(f"/{number}") for number in range(9)), UsageError),
    ):
        with pytest.raises(error):
            await with_volume(fake_host, volumes)
    assert snapshot(fake_host) == before


async def test_a_volume_can_be_removed_and_its_name_used_again(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """Of two hosts that remove it at once, one succeeds and the other gets NotFound."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    async with make_host() as other:
        outcomes = await asyncio.gather(fake_host.volumes.rm("data"), other.volumes.rm("data"), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType", "NotFound"]
    await assert_tidy(fake_host)
    await fake_host.volumes.create("data", size_bytes=SIZE)
    await assert_tidy(fake_host)


# Forks


async def test_the_writer_of_a_volume_is_not_forked(fake_host: AsyncHost) -> None:
    """It is not forked in any state, promoted or kept as a snapshot.

    Each refusal names the volume and has a hint.
    """
    await fake_host.volumes.create("data", size_bytes=SIZE)
    await with_volume(fake_host, WRITES)
    says = "oak is the only writer of the volume data"
    for state in (State.RUNNING, State.STANDBY, State.STOPPED):
        if state is State.STANDBY:
            await fake_host.call(StandbyRequest(instance="oak"))
        if state is State.STOPPED:
            await fake_host.call(RestoreRequest(instance="oak"))
            await fake_host.call(StopRequest(instance="oak"))
        for target in (State.RUNNING, State.STANDBY, State.STOPPED):
            error = await refused(fake_host, fake_host.call(ForkRequest(instance="oak", count=2, target=target)), says)
        assert "--volume data:/data:ro" in (error.hint or "")
        await refused(fake_host, fake_host.call(ForkRequest(instance="oak", from_running=True)), says)
        await refused(fake_host, fake_host.call(PromoteRequest(instance="oak")), says)
        for kind in (None, SnapshotKind.STOPPED):
            await refused(fake_host, fake_host.call(SnapshotRequest(instance="oak", kind=kind)), says)
    await assert_tidy(fake_host, "oak")


async def test_forks_share_a_read_only_volume(fake_host: AsyncHost) -> None:
    """Each fork has its own hard link to the inode, and needs no source for it.

    The last one frees the volume.
    """
    data = await fake_host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(fake_host, READS)
    await fake_host.call(StandbyRequest(instance=oak.id))
    await fake_host.call(PromoteRequest(instance=oak.id))
    names = ["elm", "fir", "yew"]
    await fake_host.call(ForkRequest(instance="oak", names=[names[0]]))
    await fake_host.call(ForkRequest(instance="oak", names=[names[1]], target=State.STANDBY))
    await fake_host.call(ForkRequest(instance="oak", names=[names[2]], target=State.STOPPED))
    forks = [await fake_host.call(GetRequest(instance=name)) for name in names]
    inode = fake_host.local.rooms.layout.volume_disk(data.id).stat().st_ino
    for fork in forks:
        assert own_link(fake_host, fork).stat().st_ino == inode
        assert fork.machine.volumes == oak.machine.volumes
    await assert_tidy(fake_host, "oak", *names)
    await refused(fake_host, with_volume(fake_host, WRITES, "ash"), "oak, elm, fir, yew have it")
    await refused(fake_host, fake_host.volumes.rm("data"), "oak, elm, fir, yew have it")
    await fake_host.call(
        ForkRequest(instance="elm", names=["ivy"], from_running=True)
    )  # a stem made this fork, and was removed
    await assert_tidy(fake_host, "oak", "ivy", *names)
    for name in ("ivy", *names, "oak"):
        await fake_host.call(RmRequest(instance=name))
    await with_volume(fake_host, WRITES, "ash")
    await assert_tidy(fake_host, "ash")


async def test_a_fork_that_boots_mounts_its_volumes(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A restored machine has its mounts in its memory; a booted one has to mount them."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    await with_volume(fake_host, READS)
    await fake_host.call(StopRequest(instance="oak"))
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"], atomic=True))).instances
    assert driver.guest_state(fake_host.local.rooms.directory(elm.id)).mounts == ("0 ro /data",)
    await fake_host.call(StopRequest(instance="elm"))
    await fake_host.call(StartRequest(instance="elm"))
    assert driver.guest_state(fake_host.local.rooms.directory(elm.id)).mounts == ("0 ro /data",)


@pytest.mark.parametrize("kind", list(SnapshotKind))
async def test_a_snapshot_keeps_a_read_only_volume(fake_host: AsyncHost, kind: SnapshotKind) -> None:
    """Its own link keeps writers out as long as the snapshot exists.

    The machine can go back, and its forks have the volume.
    """
    await fake_host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(fake_host, READS)
    kept = await fake_host.call(SnapshotRequest(instance=oak.id, name="noon", kind=kind))
    await assert_tidy(fake_host, "oak")
    await fake_host.call(SnapshotRestoreRequest(snapshot="noon", start=True))
    await assert_tidy(fake_host, "oak")
    await fake_host.call(RmRequest(instance="oak"))
    await refused(fake_host, fake_host.volumes.rm("data"), "the snapshot noon has it")
    await refused(fake_host, with_volume(fake_host, WRITES, "ash"), "the snapshot noon has it")
    (elm,) = (await fake_host.call(SnapshotForkRequest(snapshot="noon", names=["elm"], atomic=True))).instances
    assert own_link(fake_host, elm).samefile(
        fake_host.local.rooms.layout.snapshot(kept.id) / files.VOLUME_DISK.format(0)
    )
    await fake_host.snapshots.rm("noon")
    await fake_host.call(RmRequest(instance="elm"))
    await fake_host.volumes.rm("data")
    await assert_tidy(fake_host)


async def test_a_volume_that_cannot_be_linked_is_refused(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file can have only so many links.

    A copy would be another volume, so the operation fails at once and leaves nothing.
    """
    await fake_host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(fake_host, READS)
    link = os.link

    def full(source: Path, destination: Path, **options: bool) -> None:
        if Path(source).name == "volume0.raw":
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, destination, **options)

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(HostCannot, match=r"Too many links.*remove forks of it first"):
        await fake_host.call(SnapshotRequest(instance=oak.id))
    with pytest.raises(HostCannot, match=r"Too many links.*remove forks of it first"):
        await fake_host.call(ForkRequest(instance=oak.id, from_running=True))
    assert (await fake_host.call(GetRequest(instance=oak.id))).state is State.RUNNING
    await assert_tidy(fake_host, oak.name)


# Memory and disk


@pytest.mark.parametrize("volumes", [WRITES, READS], ids=["writes", "reads"])
async def test_memory_is_not_used_with_a_changed_volume(fake_host: AsyncHost, volumes: Sequence[VolumeMount]) -> None:
    """The guest's memory must match the file system, so a later write is detected."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(fake_host, volumes)
    await fake_host.call(StandbyRequest(instance=oak.id))
    await fake_host.call(RestoreRequest(instance=oak.id))
    await fake_host.call(StandbyRequest(instance=oak.id))
    disk = own_link(fake_host, oak)
    mode = disk.stat().st_mode
    disk.chmod(0o600)
    with disk.open("r+b") as file:
        file.seek(SIZE - 1)
        file.write(b"x")
    disk.chmod(stat.S_IMODE(mode))
    report = await fake_host.verify()
    assert ("oak", "since the capture") in [(found.name, found.detail[-17:]) for found in report.differences]
    with pytest.raises(IntegrityError, match="a disk was written to"):
        await fake_host.call(RestoreRequest(instance=oak.id))
    assert (await fake_host.call(GetRequest(instance=oak.id))).state is State.STOPPED
    await fake_host.call(StartRequest(instance=oak.id))
    await assert_tidy(fake_host, "oak")


async def test_the_volumes_of_a_capture_survive_a_power_cut(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Volumes are synced as the overlay is, because memory needs the disks of its own instant."""
    await fake_host.volumes.create("data", size_bytes=SIZE)
    oak = await with_volume(fake_host, WRITES)
    synced: set[int] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    await fake_host.call(StandbyRequest(instance=oak.id))
    assert own_link(fake_host, oak).stat().st_ino in synced


async def test_verify_checks_volumes_without_a_running_writer(fake_host: AsyncHost) -> None:
    """A damaged volume and a wrong link are named.

    A volume that is being written to is reported as skipped.
    """
    for name in ("data", "bad", "busy"):
        await fake_host.volumes.create(name, size_bytes=SIZE)
    await with_volume(fake_host, (at("/data", readonly=True), at("/bad", "bad", readonly=True)))
    await with_volume(fake_host, (at("/busy", "busy"),), "ash")
    bad = fake_host.local.rooms.layout.volume_disk((await fake_host.volumes.inspect("bad")).volume.id)
    bad.chmod(0o600)
    with bad.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 65536)
    report = await fake_host.verify()
    assert [(found.holder, found.name, found.file) for found in report.differences] == [("volume", "bad", "data.raw")]
    assert set(report.skipped) == {"oak", "ash", "busy"}
    ash = await fake_host.call(StopRequest(instance="ash"))
    own_link(fake_host, ash).unlink()
    own_link(fake_host, ash).write_bytes(b"")
    found = [(each.name, each.detail) for each in (await fake_host.verify()).differences]
    assert ("ash", "it is not the volume busy") in found
