"""The mem-file is frozen once, linked, checked before use, hashed, and never changed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.errors import IntegrityError, Refused
from coppice.memory import memfile
from coppice.memory.memfile import check, copy_private, freeze, link
from coppice.model import MIB, MemFile, Progress, Sharing


def ram_file(path: Path, size: int = 3 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(MIB)
        file.write(os.urandom(9000))
    return path


@pytest.fixture
def frozen(tmp_path: Path) -> tuple[Path, MemFile]:
    path = tmp_path / "memory"
    return path, freeze(ram_file(tmp_path / "live"), path)


def test_a_frozen_file_is_the_live_one_made_immutable(tmp_path: Path) -> None:
    """Freezing moves the inode to its final name with mode 0444, and the returned record passes the
    check.
    """
    live = ram_file(tmp_path / "live")
    inode, contents = live.stat().st_ino, live.read_bytes()
    mem = freeze(live, tmp_path / "memory")
    assert (mem.inode, mem.size_bytes, mem.sharing) == (inode, 3 * MIB, Sharing.OWN)
    assert (tmp_path / "memory").read_bytes() == contents
    assert stat.S_IMODE((tmp_path / "memory").stat().st_mode) == 0o444
    assert not live.exists()
    check(tmp_path / "memory", mem)


def test_a_second_freeze_replaces_the_name(frozen: tuple[Path, MemFile], tmp_path: Path) -> None:
    """A second capture replaces the name, not the inode: links to the first file keep its contents."""
    path, first = frozen
    _, _ = link(path, tmp_path / "fork", first)
    before = (tmp_path / "fork").read_bytes()
    second = freeze(ram_file(tmp_path / "live2"), path)
    assert second.inode != first.inode
    assert (tmp_path / "fork").read_bytes() == before


def test_data_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If syncing fails, the final name does not exist."""

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    live = ram_file(tmp_path / "live")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Exception, match="Cannot freeze"):
        freeze(live, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_freezing_a_missing_image_is_an_error(tmp_path: Path) -> None:
    """A missing image raises an integrity error."""
    with pytest.raises(IntegrityError):
        freeze(tmp_path / "live", tmp_path / "memory")


def test_a_link_costs_nothing_and_outlives_its_source(frozen: tuple[Path, MemFile], tmp_path: Path) -> None:
    """A fork's link has the source's inode and hash, takes no space, and outlives the source."""
    path, mem = frozen
    mem = msgspec.structs.replace(mem, sha256="ab" * 32)
    own, written = link(path, tmp_path / "fork", mem)
    assert (own.inode, own.sharing, own.reason, own.sha256, written) == (mem.inode, Sharing.HARDLINK, "", "ab" * 32, 0)
    assert path.stat().st_nlink == 2
    path.unlink()
    check(tmp_path / "fork", own)


def test_a_file_without_a_record_can_be_linked(frozen: tuple[Path, MemFile], tmp_path: Path) -> None:
    """Without a record the link has nothing to be compared with."""
    own, _ = link(frozen[0], tmp_path / "fork", None)
    assert (own.inode, own.sha256) == (frozen[1].inode, None)


def test_an_impossible_link_becomes_a_copy(
    frozen: tuple[Path, MemFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is reported with its reason and bytes, has its own inode, and passes its own check."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(os, "link", refused)
    own, _ = link(frozen[0], tmp_path / "fork", frozen[1])
    assert own.sharing is Sharing.COPY
    assert "hard links" in own.reason
    assert own.inode != frozen[1].inode
    check(tmp_path / "fork", own)


def test_a_link_to_a_changed_source_is_refused(frozen: tuple[Path, MemFile], tmp_path: Path) -> None:
    """A source that differs from its record is not linked, and an existing destination is not
    replaced.
    """
    path, mem = frozen
    with pytest.raises(IntegrityError, match="size"):
        link(path, tmp_path / "fork", msgspec.structs.replace(mem, size_bytes=1))
    assert not (tmp_path / "fork").exists()
    (tmp_path / "fork").touch()
    with pytest.raises(Refused):
        link(path, tmp_path / "fork", mem)


def _truncate(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, 4096)
    path.chmod(0o444)


def _replace(path: Path) -> None:
    other = ram_file(path.with_name("other"))
    other.chmod(0o444)
    other.rename(path)


def _alias(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (Path.unlink, "missing"),
        (_truncate, "size"),
        (_replace, "inode"),
        (_alias, "regular"),
        (lambda path: path.chmod(0o644), "mode"),
    ],
)
def test_check_names_the_difference(frozen: tuple[Path, MemFile], damage: Callable[[Path], None], word: str) -> None:
    """Each kind of damage is refused with its own message, before a VMM maps the file and gets a
    SIGBUS.
    """
    path, mem = frozen
    check(path, mem)
    damage(path)
    with pytest.raises(IntegrityError, match=word):
        check(path, mem)


@given(
    pieces=st.lists(st.tuples(st.integers(0, 5 * MIB), st.binary(min_size=1, max_size=300)), max_size=6),
    size=st.integers(0, 5 * MIB),
)
def test_the_hash_covers_all_bytes(pieces: list[tuple[int, bytes]], size: int) -> None:
    """The hash equals that of a plain read, wherever the holes are."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "memory"
        with path.open("wb") as file:
            file.truncate(size)
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
        assert memfile.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_flipped_byte_changes_the_hash(frozen: tuple[Path, MemFile]) -> None:
    """The hash detects damage that does not change the size or the inode."""
    path, _ = frozen
    before = memfile.sha256(path)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(2 * MIB + 5)
        file.write(b"\x01")
    assert memfile.sha256(path) != before


def test_a_hash_reports_progress_and_can_be_cancelled(frozen: tuple[Path, MemFile]) -> None:
    """The last progress step is the whole file; a cancelled hash is None, not a wrong value."""
    steps: list[Progress] = []
    assert memfile.sha256(frozen[0], progress=steps.append) is not None
    assert (steps[-1].done, steps[-1].total, steps[-1].unit) == (3 * MIB, 3 * MIB, "bytes")
    answers = iter([False, True])
    assert memfile.sha256(frozen[0], cancelled=lambda: next(answers)) is None


def test_a_missing_file_has_no_hash(tmp_path: Path) -> None:
    """The hash of a missing file is None."""
    with pytest.raises(IntegrityError):
        memfile.sha256(tmp_path / "memory")


def test_a_private_copy_shares_nothing(frozen: tuple[Path, MemFile], tmp_path: Path) -> None:
    """The naive baseline is a real copy: a new inode, equal bytes, a count of its bytes, and the
    same holes.
    """
    path, mem = frozen
    own, written = copy_private(path, tmp_path / "copy", reason="asked for")
    assert (own.sharing, own.reason, own.size_bytes) == (Sharing.COPY, "asked for", mem.size_bytes)
    assert own.inode != mem.inode
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert 9000 <= written <= 16384
    check(tmp_path / "copy", own)
