"""Overlay disks: small, reproducible, made once, and checked by e2fsck."""

from __future__ import annotations

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coppice.disk import ext4
from coppice.disk.ext4 import NotFinished, fsck
from coppice.disk.overlay import OverlayStore
from coppice.errors import HostCannot, IntegrityError, MissingTool, UsageError
from coppice.model import GIB, MIB


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(("size", "limit"), [(16 * MIB, 128 << 10), (2 * GIB, 160 << 10), (64 * GIB, 256 << 10)])
def test_pristine_image_is_small_and_clean(tmp_path: Path, size: int, limit: int) -> None:
    """Every instance copies what the image has allocated, so that must stay far below a MiB at any size."""
    path = OverlayStore(tmp_path).pristine(size)
    assert path.stat().st_size == size
    assert allocated(path) <= limit
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    result = fsck(path)
    assert result.clean, result.output
    assert not result.journal_replayed


def test_image_depends_on_size_and_recipe_only(tmp_path: Path) -> None:
    """Two hosts make the same bytes under the same name: no random UUID, no clock."""
    paths = [OverlayStore(tmp_path / name).pristine(64 * MIB) for name in ("one", "two")]
    assert paths[0].name == paths[1].name
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 1


def test_image_is_made_once(tmp_path: Path) -> None:
    """The second call finds the first one's file; the name tells a changed recipe apart."""
    store = OverlayStore(tmp_path)
    assert store.pristine(16 * MIB).stat().st_ino == store.pristine(16 * MIB).stat().st_ino
    assert [path.name for path in tmp_path.iterdir()] == [store.path(16 * MIB).name]


def test_makers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Many that need the same image at once all get a whole one, and leave nothing else."""
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


def test_clone_is_writable_and_apart(tmp_path: Path) -> None:
    """An instance's disk is its own: writing to it does not reach the pristine image."""
    store = OverlayStore(tmp_path / "overlays")
    store.create(16 * MIB, tmp_path / "disk")
    before = hashlib.sha256(store.pristine(16 * MIB).read_bytes()).digest()
    assert stat.S_IMODE((tmp_path / "disk").stat().st_mode) == 0o600
    assert allocated(tmp_path / "disk") <= 128 << 10
    with (tmp_path / "disk").open("r+b") as disk:
        disk.write(b"\xff" * MIB)
    assert hashlib.sha256(store.pristine(16 * MIB).read_bytes()).digest() == before


def test_fsck_sees_damage(tmp_path: Path) -> None:
    """The check can fail: a bitmap that is wiped is not clean."""
    OverlayStore(tmp_path).create(16 * MIB, tmp_path / "disk")
    with (tmp_path / "disk").open("r+b") as disk:
        disk.seek(2 * 4096)
        disk.write(b"\xff" * 8 * 4096)
    result = fsck(tmp_path / "disk")
    assert not result.clean
    assert result.output


def test_fsck_of_something_else_is_an_error(tmp_path: Path) -> None:
    """What is no file system cannot be called unclean, and what is missing is said to be."""
    (tmp_path / "junk").write_bytes(bytes(MIB))
    with pytest.raises(HostCannot):
        fsck(tmp_path / "junk")
    with pytest.raises(IntegrityError):
        fsck(tmp_path / "missing")


@pytest.mark.parametrize("name", ["KILL", "TERM", "INT"])
def test_a_check_that_is_killed_says_nothing_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The kernel ends e2fsck where memory runs out: a sound disk must not be called damaged for that."""
    OverlayStore(tmp_path).create(16 * MIB, tmp_path / "disk")
    fake = tmp_path / "bin" / "e2fsck"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nkill -{name} $$\n")
    fake.chmod(0o755)
    monkeypatch.setitem(ext4._ENVIRONMENT, "PATH", f"{fake.parent}:/usr/bin:/bin")
    with pytest.raises(NotFinished, match=f"SIG{name}"):
        fsck(tmp_path / "disk")


@pytest.mark.parametrize("size", [0, 4096, 16 * MIB + 1, 16 << 40])
def test_impossible_sizes_are_usage_errors(tmp_path: Path, size: int) -> None:
    """A size that cannot be is refused before anything is made."""
    with pytest.raises(UsageError):
        OverlayStore(tmp_path / "overlays").pristine(size)
    assert not (tmp_path / "overlays").exists()


def test_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without e2fsprogs the error names the package, and no file is left."""
    monkeypatch.setitem(ext4._ENVIRONMENT, "PATH", str(tmp_path / "nothing"))
    with pytest.raises(MissingTool, match="e2fsprogs"):
        OverlayStore(tmp_path / "overlays").pristine(16 * MIB)
    assert not any((tmp_path / "overlays").iterdir())
