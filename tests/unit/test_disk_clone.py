"""Clones of files and directories have the same bytes and holes, and nothing half-made has a final
name.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.errors import CoppiceError, HostCannot, IntegrityError, NoSpace, Refused
from coppice.linux import clone
from coppice.linux.clone import clone_file, nonzero_parts, reflink_file
from coppice.linux.extents import data_ranges, punch_hole
from coppice.linux.files import is_temporary, os_errors, temporary_beside

BLOCK = 4096


def sparse_file(path: Path, blocks: dict[int, bytes], size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for index, data in blocks.items():
            file.seek(index * BLOCK)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def data_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return sum(length for _, length in data_ranges(file.fileno(), path.stat().st_size))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return sparse_file(tmp_path / "source", {0: b"a" * BLOCK, 300: b"b" * BLOCK * 3, 1000: b"tail"}, 8 << 20)


@pytest.mark.parametrize("reflink", [True, False])
def test_clone_keeps_bytes_and_holes(source: Path, tmp_path: Path, reflink: bool) -> None:
    """A clone has the source's bytes, size and holes, with every method."""
    result = clone_file(source, tmp_path / "clone", reflink=reflink)
    assert (tmp_path / "clone").read_bytes() == source.read_bytes()
    assert data_bytes(tmp_path / "clone") == data_bytes(source)
    assert result.bytes_written + result.shared_bytes == data_bytes(source)


@settings(deadline=None)
@given(
    blocks=st.dictionaries(st.integers(0, 40), st.binary(min_size=1, max_size=2 * BLOCK)), tail=st.integers(0, BLOCK)
)
def test_clone_of_any_layout_is_equal(blocks: dict[int, bytes], tail: int) -> None:
    """Each method gives equal bytes for any layout of data, holes and a partial last block."""
    with tempfile.TemporaryDirectory() as name:
        path = sparse_file(Path(name) / "source", blocks, 43 * BLOCK + tail)
        for reflink in (True, False):
            clone_file(path, Path(name) / "clone", reflink=reflink, sync=False)
            assert (Path(name) / "clone").read_bytes() == path.read_bytes()


def test_a_copy_through_memory_skips_zero_blocks(tmp_path: Path) -> None:
    """A copy through memory does not grow the file: blocks of zeros inside data become holes."""
    path = sparse_file(tmp_path / "source", {0: b"x" * BLOCK + bytes(BLOCK * 62) + b"y" * BLOCK}, 64 * BLOCK)
    result = clone_file(path, tmp_path / "clone", reflink=False)
    assert result.bytes_written == 2 * BLOCK
    assert data_bytes(tmp_path / "clone") == 2 * BLOCK


def test_a_kernel_without_copy_file_range_is_handled(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If copy_file_range is not possible, the copy reads and writes."""

    def declined(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", declined)
    assert clone_file(source, tmp_path / "clone").method == "sparse"
    assert (tmp_path / "clone").read_bytes() == source.read_bytes()


def test_the_mode_is_set_and_the_destination_replaced(source: Path, tmp_path: Path) -> None:
    """The clone has the requested mode and replaces the destination by rename: a process with the
    old file open keeps its bytes.
    """
    destination = tmp_path / "clone"
    destination.write_bytes(b"old")
    with destination.open("rb") as old:
        clone_file(source, destination, mode=0o444)
        assert old.read() == b"old"
    assert stat.S_IMODE(destination.stat().st_mode) == 0o444


def test_failed_copy_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk raises NoSpace with a hint, the destination is untouched and no temporary file
    stays.
    """

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(clone, "FICLONE", 0)  # forces the copy on every file system
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NoSpace) as caught:
        clone_file(source, tmp_path / "clone")
    assert caught.value.hint
    assert sorted(tmp_path.iterdir()) == before


def test_only_regular_files_are_cloned(source: Path, tmp_path: Path) -> None:
    """A symbolic link, a fifo and a missing source are refused at once, with the reason."""
    (tmp_path / "link").symlink_to(source)
    os.mkfifo(tmp_path / "fifo")
    for name, error in (("link", HostCannot), ("fifo", HostCannot), ("missing", IntegrityError)):
        with pytest.raises(error):
            clone_file(tmp_path / name, tmp_path / "clone")
    assert not (tmp_path / "clone").exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EEXIST, Refused),
        (errno.ENOENT, IntegrityError),
        (errno.ELOOP, HostCannot),
        (errno.EIO, HostCannot),
    ],
)
def test_every_os_error_is_translated(code: int, error: type[CoppiceError]) -> None:
    """Callers see only Coppice's own exceptions, always with a hint."""
    with pytest.raises(error, match="Cannot do it") as caught, os_errors("do it"):
        raise OSError(code, os.strerror(code))
    assert caught.value.hint


def test_temporary_names_are_recognised(tmp_path: Path) -> None:
    """Temporary names are unique, in the same directory and marked, so that the recovery sweep can
    tell leftovers from files.
    """
    first, second = temporary_beside(tmp_path / "memory"), temporary_beside(tmp_path / "memory")
    assert first != second
    assert first.parent == tmp_path
    assert is_temporary(first.name)
    assert not is_temporary("memory")


@given(
    st.lists(st.sampled_from([bytes(BLOCK), b"x" * BLOCK, bytes(BLOCK - 1) + b"y"]), max_size=20), st.binary(max_size=9)
)
def test_nonzero_parts_cover_all_data(blocks: list[bytes], tail: bytes) -> None:
    """The parts with zeros between them give back the chunk, and no part contains a block of zeros."""
    chunk = b"".join(blocks) + tail
    rebuilt = bytearray(len(chunk))
    last_end = -1
    for offset, part in nonzero_parts(chunk):
        assert offset > last_end
        last_end = offset + len(part)
        rebuilt[offset:last_end] = part
        assert all(any(part[at : at + BLOCK]) for at in range(0, len(part), BLOCK))
    assert rebuilt == chunk


def test_punched_hole_reads_as_zeros(tmp_path: Path) -> None:
    """A hole frees its blocks and keeps the size."""
    path = sparse_file(tmp_path / "file", {0: b"x" * BLOCK * 8}, 8 * BLOCK)
    with path.open("r+b") as file:
        punch_hole(file.fileno(), 2 * BLOCK, 4 * BLOCK)
    assert path.read_bytes() == b"x" * BLOCK * 2 + bytes(BLOCK * 4) + b"x" * BLOCK * 2
    assert data_bytes(path) == 4 * BLOCK
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file"):
        punch_hole(file.fileno(), 0, BLOCK)


def test_a_file_system_without_reflinks_is_noticed(tmp_path: Path) -> None:
    """A clone by reflink is whole, or there is none."""
    (tmp_path / "a").write_bytes(b"content")
    done = reflink_file(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["a", "b"] if done else ["a"])
