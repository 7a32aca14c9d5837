"""Long work checks regularly whether its caller was cancelled, ends at the next check, and leaves
nothing.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coppice.boot.kernel import KernelStore
from coppice.content.overlay import OverlayStore
from coppice.images.archive import Archive, open_archive
from coppice.images.blobs import Verifier
from coppice.images.erofs import write_erofs
from coppice.linux import clone
from coppice.linux.clone import clone_file
from coppice.linux.link import link_or_copy
from coppice.memory import memfile
from coppice.model import MIB, no_progress
from coppice.stopping import WorkStopped, run
from coppice.volumes import disk as volume
from coppice.volumes.content import volume_from_archive
from coppice.volumes.ext4 import fsck
from image_archives import Member, apply_layers, file, tar, workspace
from kernel_files import RELEASE, bzimage, module_tree

DATA = os.urandom(MIB)
MEMBERS: list[Member] = [file(f"file{number}", b"x" * 100) for number in range(50)]


class CountedFlag(threading.Event):
    """A flag that counts its checks, and is set from one of them on."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.questions = 0
        self._last = last

    def is_set(self) -> bool:
        self.questions += 1
        return self._last is not None and self.questions >= self._last


def large(path: Path) -> Path:
    """Write a file of eight MiB."""
    path.write_bytes(DATA * 8)
    return path


def clone_in_memory(room: Path) -> None:
    clone_file(large(room / "large"), room / "out" / "clone", reflink=False)


def clone_in_kernel(room: Path) -> None:
    clone_file(large(room / "large"), room / "out" / "clone")


def copy_for_want_of_a_link(room: Path) -> None:
    link_or_copy(large(room / "large"), room / "out" / "own")


def hash_memory(room: Path) -> None:
    memfile.sha256(large(room / "large"))


def write_image(room: Path) -> None:
    with workspace(room) as space, (room / "image").open("wb") as out:
        write_erofs(apply_layers(space, tar(file("large", DATA * 8))), out, max_bytes=64 * MIB)


def plan_image(room: Path) -> None:
    with workspace(room) as space:
        tree = apply_layers(space, tar(*MEMBERS))
    assert len(list(tree.walk())) == len(MEMBERS)


def index_archive(room: Path) -> None:
    with workspace(room) as space:
        Archive(io.BytesIO(tar(*MEMBERS)), space, must_end=True)


def unpack_bomb(room: Path) -> None:
    (room / "bomb.gz").write_bytes(gzip.compress(bytes(64 * MIB)))
    with workspace(room) as space:
        open_archive(room / "bomb.gz", space)


def hash_blob(_: Path) -> None:
    Verifier("sha256:" + "0" * 64, None).update_from(io.BytesIO(DATA * 8))


def add_kernel(room: Path) -> None:
    (room / "bzImage").write_bytes(bzimage())
    KernelStore(room / "out").add(room / "bzImage", module_tree(room / "modules", release=RELEASE))


def make_overlay(room: Path) -> None:
    OverlayStore(room / "out").pristine(64 * MIB)


def make_volume(room: Path) -> None:
    volume.create(room / "out" / "data.raw", 64 * MIB)


def fill_volume(room: Path) -> None:
    (room / "archive.tar").write_bytes(tar(*MEMBERS, file("large", DATA)))
    volume_from_archive(room / "archive.tar", room / "out" / "data.raw", 64 * MIB, progress=no_progress)


def check_disk(room: Path) -> None:
    volume.create(room / "data.raw", 64 * MIB)
    fsck(room / "data.raw")


WORKS: dict[Callable[[Path], None], int] = {
    clone_in_memory: 8,
    clone_in_kernel: 8,
    copy_for_want_of_a_link: 8,
    hash_memory: 8,
    write_image: 8,
    plan_image: 50,
    index_archive: 50,
    unpack_bomb: 60,
    hash_blob: 8,
    add_kernel: 10,
    make_overlay: 2,
    make_volume: 2,
    fill_volume: 100,
    check_disk: 4,
}
"""The least number of checks for each kind of work, in proportion to its size."""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory whose files cannot be linked or shared."""
    monkeypatch.setattr(clone, "_reflink", lambda *_: False)
    monkeypatch.setattr(clone, "_KERNEL_CHUNK", MIB)
    make_link = os.link

    def cannot_link(source: str, destination: str, **options: Any) -> None:
        if "dst_dir_fd" not in options:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        make_link(source, destination, **options)

    monkeypatch.setattr(os, "link", cannot_link)
    return tmp_path


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
@pytest.mark.parametrize("part", [0.0, 0.5], ids=["begin", "middle"])
def test_work_ends_at_a_check_and_leaves_nothing(room: Path, work: Callable[[Path], None], part: float) -> None:
    """The work ends at its first check, and at one halfway through."""
    whole = CountedFlag()
    for name in ("whole", "cut"):
        (room / name / "out").mkdir(parents=True)
    run(whole, work, room / "whole")
    assert whole.questions >= WORKS[work]
    with pytest.raises(WorkStopped):
        run(CountedFlag(max(1, int(part * WORKS[work]))), work, room / "cut")
    assert list((room / "cut" / "out").iterdir()) == []
