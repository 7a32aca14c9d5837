"""Overlay disks are small, reproducible, made once, and checked by e2fsck."""

from __future__ import annotations

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coppice.content.overlay import OverlayStore
from coppice.errors import HostCannot, IntegrityError, MissingTool, UsageError
from coppice.linux import e2fs
from coppice.linux.tool import NotFinished
from coppice.model import GIB, MIB
from coppice.volumes.ext4 import fsck, needs_recovery


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(("size", "limit"), [(16 * MIB, 128 << 10), (2 * GIB, 160 << 10), (64 * GIB, 256 << 10)])
def test_pristine_image_is_small_and_clean(tmp_path: Path, size: int, limit: int) -> None:
    """Every instance copies the image's allocated blocks, so these must stay far below one MiB for
    any size.
    """
    path = OverlayStore(tmp_path).pristine(size)
    assert path.stat().st_size == size
    assert allocated(path) <= limit
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    result = fsck(path)
    assert result.clean, result.output
    assert not needs_recovery(path)


def test_the_image_depends_only_on_size_and_recipe(tmp_path: Path) -> None:
    """Two hosts make the same bytes under the same name, without a random UUID or a clock."""
    paths = [OverlayStore(tmp_path / name).pristine(64 * MIB) for name in ("one", "two")]
    assert paths[0].name == paths[1].name
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 1


def test_image_is_made_once(tmp_path: Path) -> None:
    """The second call finds the file of the first one; a changed recipe changes the name."""
    store = OverlayStore(tmp_path)
    assert store.pristine(16 * MIB).stat().st_ino == store.pristine(16 * MIB).stat().st_ino
    assert [path.name for path in tmp_path.iterdir()] == [store.path(16 * MIB).name]


def test_concurrent_makers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each concurrent maker of the same image gets a complete one, and leaves nothing else."""
    with ThreadPoolExecutor(6) as pool:
        clones = list(
            pool.map(
                lambda number: OverlayStore(tmp_path / "overlays").create(16 * MIB, tmp_path / f"disk-{number}"),
                range(6),
            )
        )
    assert len(clones) == 6
    assert len(list((tmp_path / "overlays").iterdir())) == 1
    for number in range(6):
        assert fsck(tmp_path / f"disk-{number}").clean


def test_a_clone_is_writable_and_independent(tmp_path: Path) -> None:
    """A write to an instance's disk does not change the pristine image."""
    store = OverlayStore(tmp_path / "overlays")
    store.create(16 * MIB, tmp_path / "disk")
    before = hashlib.sha256(store.pristine(16 * MIB).read_bytes()).digest()
    assert stat.S_IMODE((tmp_path / "disk").stat().st_mode) == 0o600
    assert allocated(tmp_path / "disk") <= 128 << 10
    with (tmp_path / "disk").open("r+b") as disk:
        disk.write(b"\xff" * MIB)
    assert hashlib.sha256(store.pristine(16 * MIB).read_bytes()).digest() == before


def test_fsck_detects_damage(tmp_path: Path) -> None:
    """The check can fail: an image with a wiped bitmap is not clean."""
    OverlayStore(tmp_path).create(16 * MIB, tmp_path / "disk")
    with (tmp_path / "disk").open("r+b") as disk:
        disk.seek(2 * 4096)
        disk.write(b"\xff" * 8 * 4096)
    result = fsck(tmp_path / "disk")
    assert not result.clean
    assert result.output


def test_fsck_of_another_file_is_an_error(tmp_path: Path) -> None:
    """A file without a file system is an error rather than unclean, and a missing file is reported
    as missing.
    """
    (tmp_path / "junk").write_bytes(bytes(MIB))
    with pytest.raises(HostCannot):
        fsck(tmp_path / "junk")
    with pytest.raises(IntegrityError):
        fsck(tmp_path / "missing")


@pytest.mark.parametrize("name", ["KILL", "TERM", "INT"])
def test_a_killed_check_does_not_condemn_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The kernel may kill e2fsck when memory runs out: a sound disk must not be called damaged."""
    OverlayStore(tmp_path).create(16 * MIB, tmp_path / "disk")
    fake = tmp_path / "bin" / "e2fsck"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nkill -{name} $$\n")
    fake.chmod(0o755)
    monkeypatch.setitem(e2fs.ENVIRONMENT, "PATH", f"{fake.parent}:/usr/bin:/bin")
    with pytest.raises(NotFinished, match=f"SIG{name}"):
        fsck(tmp_path / "disk")


@pytest.mark.parametrize("size", [0, 4096, 16 * MIB + 1, 16 << 40])
def test_impossible_sizes_are_usage_errors(tmp_path: Path, size: int) -> None:
    """An impossible size is refused before anything is made."""
    with pytest.raises(UsageError):
        OverlayStore(tmp_path / "overlays").pristine(size)
    assert not (tmp_path / "overlays").exists()


def test_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without e2fsprogs the error names the package, and no file is left."""
    monkeypatch.setitem(e2fs.ENVIRONMENT, "PATH", str(tmp_path / "nothing"))
    with pytest.raises(MissingTool, match="e2fsprogs"):
        OverlayStore(tmp_path / "overlays").pristine(16 * MIB)
    assert not any((tmp_path / "overlays").iterdir())
