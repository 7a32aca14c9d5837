"""Verify names each changed file of a capture with its holder, accepts unchanged files, and never
replaces a recorded hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import NoSpace
from coppice.model import Instance, Progress, Snapshot, SnapshotKind, State
from coppice.requests import ExecRequest, ForkRequest, GetRequest, SnapshotForkRequest, SnapshotRequest
from coppice.vmm import driver as files
from fakes.hosting import assert_tidy, boot, make, memory_of, snapshot
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES

Damage = Callable[[Path], None]


def changed(path: Path, work: Damage) -> None:
    """Do something to a read-only file, and restore its mode."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    work(path)
    path.chmod(mode)


def flip(at: int) -> Damage:
    """Return a function that flips one bit of one byte."""

    def work(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    return work


def truncate(path: Path) -> None:
    """Cut off the last page."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)


async def findings(host: AsyncHost) -> list[tuple[str, str, str]]:
    """Return holder, file and detail of each difference."""
    report = await host.verify()
    return [(f"{found.holder} {found.name}", found.file, found.detail) for found in report.differences]


async def grown(host: AsyncHost) -> tuple[Instance, Snapshot]:
    """Make a template with a parked fork and a snapshot, all with one mem-file."""
    oak = await make(host, State.TEMPLATE)
    kept = await host.call(SnapshotRequest(instance="oak", name="kept"))
    await host.call(ForkRequest(instance="oak", names=["elm"], target=State.STANDBY))
    return oak, kept


async def test_unchanged_files_pass_and_are_recorded_once(fake_host: AsyncHost) -> None:
    """A mem-file with three links is read once and recorded for each.

    The next run records nothing, and new forks inherit the hash.
    """
    await grown(fake_host)
    await make(fake_host, State.STOPPED, "fir")
    seen: list[Progress] = []
    first = await fake_host.verify(progress=seen.append)
    assert (first.mem_files, first.disks, first.recorded) == (1, 4, 4)  # three of memory, one of the snapshot's disk
    assert first.bytes_hashed == MEMORY_BYTES + OVERLAY_BYTES
    assert first.differences == ()
    assert first.skipped == ()
    assert {"hash", "disks"} == {progress.stage for progress in seen}
    before = snapshot(fake_host)
    second = await fake_host.verify()
    assert (second.recorded, second.mem_files, second.differences) == (0, 1, ())
    assert snapshot(fake_host) == before
    (ash,) = (await fake_host.call(ForkRequest(instance="oak", names=["ash"], target=State.STANDBY))).instances
    (yew,) = (await fake_host.call(SnapshotForkRequest(snapshot="kept", names=["yew"], target=State.STANDBY))).instances
    sums = {each.mem_file.sha256 for each in (ash, yew) if each.mem_file}
    kept = (await fake_host.snapshots.inspect("kept")).snapshot
    assert kept.disk_sha256
    assert sums == {kept.mem_file.sha256 if kept.mem_file else None}
    await assert_tidy(fake_host, "oak", "elm", "fir", "ash", "yew")


async def test_a_running_machine_is_not_disturbed(fake_host: AsyncHost) -> None:
    """Its disk is in use, so it is skipped and reported as such.

    The mem-file that it maps is checked like any other.
    """
    await boot(fake_host, "ash")
    await grown(fake_host)
    await fake_host.call(ForkRequest(instance="oak", names=["fir"]))
    report = await fake_host.verify()
    assert report.skipped == ("ash", "fir")
    assert (report.mem_files, report.disks, report.differences) == (1, 3, ())
    assert (await fake_host.call(ExecRequest(instance="fir", argv=["hostname"]))).stdout == b"fir\n"
    fir = await fake_host.call(GetRequest(instance="fir"))
    assert fir.mem_file
    assert fir.mem_file.sha256


@pytest.mark.parametrize("at", [0, MEMORY_BYTES // 2, MEMORY_BYTES - 1], ids=["first", "hole", "last"])
async def test_a_flipped_bit_in_shared_memory_is_named_for_every_holder(fake_host: AsyncHost, at: int) -> None:
    """The template, its fork and its snapshot share the file, and so does a fork made after the
    hash was recorded.
    """
    oak, _ = await grown(fake_host)
    await fake_host.verify()
    changed(memory_of(fake_host, oak), flip(at))
    await fake_host.call(ForkRequest(instance="oak", names=["fir"], target=State.STANDBY))
    found = await findings(fake_host)
    assert [(holder, file) for holder, file, _ in found] == [
        (holder, files.MEMORY) for holder in ("instance oak", "instance elm", "instance fir", "snapshot kept")
    ]
    assert all("SHA-256" in detail for _, _, detail in found)
    assert await findings(fake_host) == found  # the wrong sum was not recorded


async def test_sums_that_a_full_disk_refuses_are_recorded_by_the_next_run(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is checked all the same."""

    def refuse(*_: object, **__: object) -> bool:
        raise NoSpace("the disk is full", hint="see the test")

    await grown(fake_host)
    store = fake_host.local.rooms.store
    with monkeypatch.context() as full:
        full.setattr(store, "record_sha256", refuse)
        full.setattr(store.snapshots, "record_sha256", refuse)
        report = await fake_host.verify()
    assert (report.mem_files, report.disks, report.recorded, report.differences) == (1, 3, 0, ())
    assert (await fake_host.verify()).recorded == 4


async def test_a_holder_without_a_hash_is_compared_with_the_others(fake_host: AsyncHost) -> None:
    """A new link to a file that has changed must not have the changed content accepted."""
    oak, _ = await grown(fake_host)
    await fake_host.verify()
    stored = fake_host.local.rooms.store.get("elm")
    assert stored.capture
    without = msgspec.structs.replace(
        stored.capture, mem_file=msgspec.structs.replace(stored.capture.mem_file, sha256=None)
    )
    fake_host.local.rooms.store.save(msgspec.structs.replace(stored, capture=without))
    changed(memory_of(fake_host, oak), flip(4096))
    assert "instance elm" in [holder for holder, _, _ in await findings(fake_host)]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: changed(path, truncate), "its size is"),
        (lambda path: path.chmod(0o644), "its mode is 0644"),
        (lambda path: path.unlink(), "it is missing"),
        (lambda path: (path.rename(path.with_name("x")), path.write_bytes(b"other")), "its inode is"),
    ],
    ids=["truncated", "writable", "missing", "replaced"],
)
async def test_a_replaced_mem_file_is_found_without_a_hash(fake_host: AsyncHost, damage: Damage, says: str) -> None:
    """Size, mode and inode recorded at the capture suffice, also in the first run."""
    oak = await make(fake_host, State.STANDBY)
    damage(memory_of(fake_host, oak))
    ((holder, file, detail),) = await findings(fake_host)
    assert (holder, file) == ("instance oak", files.MEMORY)
    assert says in detail


@pytest.mark.parametrize("kind", list(SnapshotKind))
async def test_every_file_of_a_snapshot_is_checked(fake_host: AsyncHost, kind: SnapshotKind) -> None:
    """Device state and disk are checked too, for changes that show in the metadata and for those
    that only the hash shows.
    """
    await make(fake_host, State.STANDBY)
    kept = await fake_host.call(SnapshotRequest(instance="oak", name="kept", kind=kind))
    await fake_host.verify()
    directory = fake_host.local.rooms.layout.snapshot(kept.id)
    disk = directory / files.OVERLAY_DISK
    status = disk.stat()
    changed(disk, flip(OVERLAY_BYTES - 5))
    sharing = {"snapshot kept", *(["instance oak"] if status.st_nlink > 1 else [])}  # they may have one file
    found = await findings(fake_host)
    assert {(holder, file) for holder, file, _ in found} == {(holder, files.OVERLAY_DISK) for holder in sharing}
    os.utime(disk, ns=(status.st_atime_ns, status.st_mtime_ns))  # like a failing disk, which changes only the content
    ((holder, _, detail),) = await findings(fake_host)
    assert holder == "snapshot kept"
    assert "SHA-256" in detail
    changed(disk, flip(OVERLAY_BYTES - 5))
    os.utime(disk, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert await findings(fake_host) == []
    if kind is SnapshotKind.STANDBY:
        changed(directory / files.VMSTATE, flip(3))
        ((_, file, detail),) = await findings(fake_host)
        assert (file, "SHA-256" in detail) == (files.VMSTATE, True)
        (directory / files.VMSTATE).unlink()
        ((_, file, detail),) = await findings(fake_host)
        assert (file, detail) == (files.VMSTATE, "it is missing")


@pytest.mark.parametrize(("at", "length"), [(0, 2048), (4096, 16384)], ids=["superblock", "group descriptors"])
async def test_a_damaged_file_system_is_named(fake_host: AsyncHost, at: int, length: int) -> None:
    """e2fsck finds the damage on the disk of an instance at rest, and the other disks are checked
    all the same.
    """
    vm = await make(fake_host, State.STOPPED)
    await make(fake_host, State.STOPPED, "elm")
    with (fake_host.local.rooms.directory(vm.id) / files.OVERLAY_DISK).open("r+b") as disk:
        disk.seek(at)
        disk.write(b"\xa5" * length)
    report = await fake_host.verify()
    assert report.disks == 2
    assert [(found.name, found.file) for found in report.differences] == [("oak", files.OVERLAY_DISK)]


async def test_a_disk_that_changed_since_the_capture_is_named(fake_host: AsyncHost) -> None:
    """Captured memory cannot be used with a disk of another instant."""
    vm = await make(fake_host, State.STANDBY)
    flip(OVERLAY_BYTES - 5)(fake_host.local.rooms.directory(vm.id) / files.OVERLAY_DISK)
    ((holder, file, detail),) = await findings(fake_host)
    assert (holder, file) == ("instance oak", files.OVERLAY_DISK)
    assert "since the capture" in detail


async def test_verify_accepts_an_empty_data_directory(fake_host: AsyncHost) -> None:
    """A data directory without instances has no differences."""
    report = await fake_host.verify()
    assert (report.mem_files, report.disks, report.differences) == (0, 0, ())
