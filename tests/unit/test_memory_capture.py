"""Capture of a private mapping: a new file has all pages that the guest wrote, and the base is
unchanged.
"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from coppice.errors import IntegrityError, VmmDied
from coppice.linux.extents import data_ranges
from coppice.linux.maps import identify, private_parts, read_text, spans_of
from coppice.memory import staging
from coppice.memory.capture import PrivateCapture, guest_ram
from coppice.memory.memfile import check, freeze
from coppice.model import MIB, MemFile, Sharing
from mapping_process import MappingProcess
from memory_helpers import capture_private

PAGE = 4096
SIZE = 24 * MIB


@pytest.fixture(autouse=True, params=[256 * MIB, 7 * MIB + PAGE, PAGE], ids=["in memory", "in both", "in a file"])
def staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage private pages in memory, partly in a file, or almost all in a file."""
    monkeypatch.setattr(staging, "_IN_MEMORY_BYTES", request.param)


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, MemFile]:
    live = tmp_path / "live"
    with live.open("wb") as file:
        file.truncate(SIZE)
        file.write(random.Random(3).randbytes(6 * MIB))
        file.seek(20 * MIB)
        file.write(random.Random(4).randbytes(MIB))
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "memory"
    return path, freeze(live, path)


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "source")


def fingerprint(path: Path) -> tuple[int, int, str]:
    return path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_capture_is_the_base_plus_the_written_pages(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """The new file has scattered pages, a range longer than a batch, and more ranges than one call
    reads.
    """
    path, mem = base
    before = fingerprint(path)
    expected = bytearray(path.read_bytes())
    with MappingProcess(path) as guest:
        pieces = [(page * PAGE + 100, os.urandom(3)) for page in range(0, 2600, 2)]
        guest.write(*pieces)
        for offset, data in pieces:
            expected[offset : offset + len(data)] = data
        guest.fill(12 * MIB, 9 * MIB, 0x5A)
        expected[12 * MIB : 21 * MIB] = b"\x5a" * (9 * MIB)
        captured, stats = capture_private(guest.pid, path, mem, tmp_path / "memory")
    assert (tmp_path / "memory").read_bytes() == expected
    assert stats.dirty_bytes == 1300 * PAGE + 9 * MIB
    assert stats.base is not None
    assert stats.written_bytes == stats.base.bytes_written + stats.dirty_bytes
    assert captured.sharing is Sharing.OWN
    check(tmp_path / "memory", captured)
    assert fingerprint(path) == before
    assert leftovers(tmp_path) == ["memory"]


def test_zeroed_pages_become_holes(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """Memory that the guest cleared takes no space in the new file, and reads as zeros."""
    path, mem = base
    with MappingProcess(path) as guest:
        guest.fill(0, 5 * MIB, 0)
        guest.fill(10 * MIB, 2 * MIB, 0)
        guest.write((MIB, b"island"))
        _, stats = capture_private(guest.pid, path, mem, tmp_path / "memory")
    assert stats.dirty_bytes == 7 * MIB
    with (tmp_path / "memory").open("rb") as file:
        ranges = list(data_ranges(file.fileno(), SIZE))
    assert ranges[:2] == [(MIB, PAGE), (5 * MIB, MIB)]
    contents = (tmp_path / "memory").read_bytes()
    assert contents[MIB : MIB + 6] == b"island"
    assert not any(contents[:MIB])
    assert contents[5 * MIB : 6 * MIB] == path.read_bytes()[5 * MIB : 6 * MIB]


def test_an_untouched_guest_gives_an_equal_file(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """Without private pages the capture equals the base, but is still a new file."""
    path, mem = base
    with MappingProcess(path) as guest:
        guest.touch()
        captured, stats = capture_private(guest.pid, path, mem, tmp_path / "memory")
    assert stats.dirty_bytes == 0
    assert captured.inode != mem.inode
    assert (tmp_path / "memory").read_bytes() == path.read_bytes()


def test_capture_of_a_capture_keeps_both_generations(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """A fork of a fork has its parent's writes and its own; the parent's file is unchanged."""
    path, mem = base
    with MappingProcess(path) as parent:
        parent.write((3 * PAGE, b"first"))
        second, _ = capture_private(parent.pid, path, mem, tmp_path / "second")
        parent.write((3 * PAGE, b"later"))
    before = fingerprint(tmp_path / "second")
    with MappingProcess(tmp_path / "second") as child:
        child.write((9 * PAGE, b"again"))
        capture_private(child.pid, tmp_path / "second", second, tmp_path / "third")
    contents = (tmp_path / "third").read_bytes()
    assert (contents[3 * PAGE : 3 * PAGE + 5], contents[9 * PAGE : 9 * PAGE + 5]) == (b"first", b"again")
    assert fingerprint(tmp_path / "second") == before


def test_collect_defines_the_captured_instant(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """Writes before the pause are captured and later ones are not; a repeated collect starts over."""
    path, mem = base
    with MappingProcess(path) as guest, PrivateCapture(path, mem, tmp_path / "memory") as work:
        guest.write((0, b"early"))
        work.prepare()
        guest.write((PAGE, b"mid"))
        assert work.collect(guest.pid) == 2 * PAGE
        guest.write((PAGE, b"new"), (2 * PAGE, b"new"))
        assert work.collect(guest.pid) == 3 * PAGE
        guest.write((PAGE, b"too late"))
        stats = work.finish().stats
    contents = (tmp_path / "memory").read_bytes()
    assert [contents[page * PAGE : page * PAGE + 3] for page in range(3)] == [b"ear", b"new", b"new"]
    assert stats.dirty_bytes == 3 * PAGE


@pytest.mark.parametrize("kind", ["shared", "copy"])
def test_other_mappings_are_not_captured_as_empty(base: tuple[Path, MemFile], tmp_path: Path, kind: str) -> None:
    """A VMM that mapped its file shared, or copied it, has no private pages: the capture is an
    error, not a file without them.
    """
    path, mem = base
    with (
        MappingProcess(path, "shared" if kind == "shared" else "copy") as guest,
        pytest.raises(IntegrityError, match="0 of"),
    ):
        capture_private(guest.pid, path, mem, tmp_path / "memory")
    assert leftovers(tmp_path) == []


def test_a_mapping_of_a_part_is_refused(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """A process that maps only a part of the mem-file cannot be captured by its private pages."""
    path, _ = base
    with MappingProcess(path) as guest:
        parts = private_parts(read_text(guest.pid, "maps"), [identify(path)])
        (vma,) = guest_ram(guest.pid, spans_of(parts, lambda part: part.offset), SIZE)
        with pytest.raises(IntegrityError, match=f"{vma.length} of {SIZE * 2}"):
            guest_ram(guest.pid, [vma], SIZE * 2)


def test_a_changed_base_is_detected_before_the_capture(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """A base that differs from its record makes no capture."""
    path, mem = base
    path.chmod(0o644)
    with PrivateCapture(path, mem, tmp_path / "memory") as work, pytest.raises(IntegrityError, match="mode"):
        work.prepare()
    assert leftovers(tmp_path) == []


def test_a_dying_guest_leaves_nothing(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """A VMM that ends during a capture raises VmmDied, and nothing appears under the final name."""
    path, mem = base
    with PrivateCapture(path, mem, tmp_path / "memory") as work:
        with MappingProcess(path) as guest:
            work.prepare()
        with pytest.raises(VmmDied):
            work.collect(guest.pid)
    assert leftovers(tmp_path) == []


def test_abort_is_idempotent(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """An abort at any step, even repeated, removes all temporary files and no finished one."""
    path, mem = base
    work = PrivateCapture(path, mem, tmp_path / "memory")
    work.abort()
    work.prepare()
    assert len(leftovers(tmp_path)) == 1
    work.abort()
    work.abort()
    assert leftovers(tmp_path) == []
    with MappingProcess(path) as guest:
        work.prepare()
        work.collect(guest.pid)
        work.finish()
    work.abort()
    assert leftovers(tmp_path) == ["memory"]


def test_steps_out_of_order_are_a_bug(base: tuple[Path, MemFile], tmp_path: Path) -> None:
    """Collecting or finishing without preparation is a programming error, and raises."""
    path, mem = base
    work = PrivateCapture(path, mem, tmp_path / "memory")
    with pytest.raises(RuntimeError):
        work.collect(os.getpid())
    with pytest.raises(RuntimeError):
        work.finish()
