"""Reflinks on real XFS and btrfs, and links between file systems, on loop devices as root."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.content.overlay import OverlayStore
from coppice.errors import NoSpace
from coppice.linux import clone
from coppice.linux.clone import clone_file
from coppice.linux.extents import occupancy
from coppice.linux.link import link_or_copy
from coppice.memory.memfile import copy_private, freeze, link
from coppice.memory.report import memory_report
from coppice.model import GIB, MIB, Sharing
from coppice.volumes.ext4 import fsck, needs_recovery
from mapping_process import MappingProcess
from memory_helpers import capture_private, mapping_is_shared

MAKERS = {
    "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "ext4": ("mkfs.ext4", "-q", "-F"),
}


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def mounted(directory: Path, filesystem: str, size: int = 400 * MIB) -> Iterator[Path]:
    """Yield a fresh file system on a loop device; unmount it afterwards."""
    image, mount = directory / "image", directory / "mount"
    with image.open("wb") as file:
        file.truncate(size)
    run(*MAKERS[filesystem], str(image))
    mount.mkdir()
    run("mount", "-o", "loop", str(image), str(mount))
    try:
        yield mount
    finally:
        run("umount", str(mount))
        image.unlink()


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def reflink_root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from mounted(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def room(reflink_root: Path) -> Iterator[Path]:
    """An empty directory on the file system under test."""
    directory = reflink_root / "room"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from mounted(tmp_path_factory.mktemp("ext4"), "ext4", 64 * MIB)


def data_file(path: Path, size: int = 8 * MIB) -> Path:
    """Write random data with a hole in the middle half."""
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(size // 4))
        file.seek(3 * size // 4)
        file.write(random.Random(2).randbytes(size // 4))
    return path


def shared_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return occupancy(file.fileno()).shared_bytes


def test_reflink_shares_every_extent(room: Path) -> None:
    """The clone writes nothing, and FIEMAP shows its extents as shared."""
    source = data_file(room / "source")
    assert shared_bytes(source) == 0
    result = clone_file(source, room / "clone")
    assert result == (0, "reflink", 4 * MIB)
    assert shared_bytes(room / "clone") == 4 * MIB
    assert (room / "clone").read_bytes() == source.read_bytes()


def test_wrong_ioctl_is_noticed(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong ioctl number the clone falls back to a copy, and the report says so."""
    source = data_file(room / "source")
    monkeypatch.setattr(clone, "FICLONE", 0x40049408)
    result = clone_file(source, room / "clone")
    assert (result.method, result.bytes_written) == ("sparse", 4 * MIB)


def test_success_without_sharing_is_not_believed(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that accepts the ioctl but copies is reported as a copy."""

    def copying(src: int, dst: int) -> bool:
        os.pwrite(dst, os.pread(src, 8 * MIB, 0), 0)
        return True

    source = data_file(room / "source")
    monkeypatch.setattr(clone, "_reflink", copying)
    result = clone_file(source, room / "clone")
    assert (result.method, result.bytes_written >= 4 * MIB, result.shared_bytes) == ("sparse", True, 0)


def test_private_copy_shares_no_extent(room: Path) -> None:
    """The benchmark's baseline is a real copy even if the file system could share."""
    source = data_file(room / "source")
    _, written = copy_private(source, room / "copy", reason="baseline")
    assert written == 4 * MIB
    assert shared_bytes(room / "copy") == 0


def test_capture_of_a_fork_writes_its_pages_only(room: Path) -> None:
    """On a reflink file system a capture writes only the private pages; the base stays shared.

    On btrfs /proc/PID/maps shows another device number than stat(2), and the mapping must still be
    found.
    """
    mem = freeze(data_file(room / "live"), room / "memory")
    before = (room / "memory").read_bytes()
    with MappingProcess(room / "memory") as guest:
        guest.fill(0, MIB, 7)
        assert mapping_is_shared(guest.pid, room / "memory", mem)
        assert memory_report(guest.pid, mem, room / "memory").unique_bytes == MIB
        _, stats = capture_private(guest.pid, room / "memory", mem, room / "captured")
    assert stats.base is not None
    assert (stats.base.method, stats.written_bytes, stats.dirty_bytes) == ("reflink", MIB, MIB)
    assert shared_bytes(room / "captured") == 3 * MIB
    assert (room / "captured").read_bytes() == b"\x07" * MIB + before[MIB:]
    assert (room / "memory").read_bytes() == before


def test_link_across_file_systems_is_a_copy(room: Path, tmp_path: Path) -> None:
    """After a real EXDEV the fork copies, keeps the holes, and says why."""
    mem = freeze(data_file(room / "live"), room / "memory")
    own, written = link(room / "memory", tmp_path / "fork", mem)
    assert (own.sharing, written) == (Sharing.COPY, 4 * MIB)
    assert "different file systems" in own.reason
    assert (tmp_path / "fork").read_bytes() == (room / "memory").read_bytes()
    assert stat.S_IMODE((tmp_path / "fork").stat().st_mode) == 0o444


def test_overlay_is_cloned_by_reflink(room: Path) -> None:
    """An instance's disk writes no data blocks if the file system can share them."""
    result = OverlayStore(room / "overlays").create(2 * GIB, room / "disk")
    assert (result.method, result.bytes_written) == ("reflink", 0)
    assert fsck(room / "disk").clean


def test_a_fork_beyond_the_link_limit_is_a_copy(ext4: Path) -> None:
    """ext4 allows 65000 links to an inode. After a real EMLINK the fork is a copy with a reason."""
    source = ext4 / "source"
    source.write_bytes(b"r" * 8192)
    source.chmod(0o444)
    (ext4 / "many").mkdir()
    for number in range(64999):
        os.link(source, ext4 / "many" / str(number))
    result = link_or_copy(source, ext4 / "fork")
    assert (result.sharing, result.bytes_written) == (Sharing.COPY, 8192)
    assert "as many hard links" in result.reason


def test_a_clone_on_a_full_disk_leaves_nothing(ext4: Path, tmp_path: Path) -> None:
    """After a real ENOSPC the error has a hint, and the partial clone is removed."""
    (tmp_path / "large").write_bytes(b"x" * 80 * MIB)
    before = sorted(ext4.iterdir())
    with pytest.raises(NoSpace, match="free some space"):
        clone_file(tmp_path / "large", ext4 / "clone")
    assert sorted(ext4.iterdir()) == before


def test_overlay_stays_small_and_survives_a_crash(tmp_path: Path) -> None:
    """The writes of a first boot keep the disk below 1 MiB, and an image taken without a freeze
    replays its journal.
    """
    disk, mount = tmp_path / "disk", tmp_path / "mount"
    OverlayStore(tmp_path / "overlays").create(2 * GIB, disk)
    mount.mkdir()
    run("mount", "-o", "loop,noinit_itable,noatime", str(disk), str(mount))
    try:
        for name in ("upper/etc", "upper/var/lib", "upper/run", "work/work"):
            (mount / name).mkdir(parents=True)
        for number in range(8):
            with (mount / "upper/etc" / f"file-{number}").open("w") as file:
                file.write("written by a first boot")
                file.flush()
                os.fsync(file.fileno())
        run("sync", "-f", str(mount))
        clone_file(disk, tmp_path / "crashed")
    finally:
        run("umount", str(mount))
    os.sync()
    assert disk.stat().st_blocks * 512 < MIB * 3 // 4
    assert fsck(disk).clean
    assert needs_recovery(tmp_path / "crashed")
    crashed = fsck(tmp_path / "crashed")
    assert crashed.clean, crashed.output
