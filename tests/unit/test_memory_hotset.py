"""The hot set: what a machine touched is read ahead for the next one, and a record that cannot be trusted is no record."""

from __future__ import annotations

import random
import time
from array import array
from pathlib import Path

import pytest

from coppice.bench.accounting import cached_part, drop_from_cache
from coppice.memory import hotset
from coppice.model import MIB, PAGE_SIZE
from mapping_process import MappingProcess

SIZE = 8 * MIB


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A mem-file on a real disk."""
    path = tmp_path / "memory"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


@pytest.fixture
def hot(memory: Path) -> Path:
    """Where its record goes."""
    return memory.with_name("memory.hot")


def test_what_was_touched_is_read_ahead(memory: Path, hot: Path) -> None:
    """The record has what the process touched, and not the whole file; reading it ahead brings that into an empty page cache, and no more."""
    touched = {*range(2 * MIB, 3 * MIB, PAGE_SIZE), 5 * MIB}
    with MappingProcess(memory) as process:
        process.fill(2 * MIB, MIB, 7)
        process.write((5 * MIB, b"x"))
        hotset.record(process.pid, memory, hot)
    numbers = array("Q", hot.read_bytes())
    assert numbers[0] == memory.stat().st_ino
    ranges = zip(numbers[1::2], numbers[2::2], strict=True)
    assert touched <= {page for start, length in ranges for page in range(start, start + length, PAGE_SIZE)}
    drop_from_cache(memory)
    assert cached_part(memory) < 0.1
    wanted = hotset.prefetch(memory, hot)
    assert len(touched) * PAGE_SIZE <= wanted < 2 * MIB
    give_up = time.monotonic() + 20
    while cached_part(memory) < wanted / SIZE and time.monotonic() < give_up:
        time.sleep(0.01)  # the disk has no event for it
    assert cached_part(memory) >= wanted / SIZE
    assert cached_part(memory) < 0.5


def test_the_first_record_stays(memory: Path, hot: Path) -> None:
    """A fork that touches more does not write the file anew: it may be linked into other directories."""
    with MappingProcess(memory) as process:
        process.write((0, b"x"))
        hotset.record(process.pid, memory, hot)
        first = hot.read_bytes()
        process.write((6 * MIB, b"x"))
        hotset.record(process.pid, memory, hot)
    assert hot.read_bytes() == first


@pytest.mark.parametrize("damage", ["other inode", "beyond the end", "cut", "no record", "a link", "empty"])
def test_a_record_that_is_not_of_this_file_is_none(memory: Path, hot: Path, damage: str) -> None:
    """Nothing is read, nothing is raised, and a sound record takes its place."""
    inode = memory.stat().st_ino
    match damage:
        case "other inode":
            hot.write_bytes(array("Q", [inode + 1, 0, PAGE_SIZE]).tobytes())
        case "beyond the end":
            hot.write_bytes(array("Q", [inode, SIZE, PAGE_SIZE]).tobytes())
        case "cut":
            hot.write_bytes(array("Q", [inode, 0, PAGE_SIZE]).tobytes()[:-3])
        case "a link":
            hot.symlink_to("memory")
        case "empty":
            hot.touch()
    assert hotset.prefetch(memory, hot) == 0
    with MappingProcess(memory) as process:
        process.write((0, b"x"))
        hotset.record(process.pid, memory, hot)
    assert hotset.prefetch(memory, hot) >= PAGE_SIZE
    assert not hot.is_symlink()


def test_a_process_that_is_gone_leaves_no_record(memory: Path, hot: Path) -> None:
    """A machine that ended at once is no reason to fail its fan-out."""
    with MappingProcess(memory) as process:
        pass
    hotset.record(process.pid, memory, hot)
    assert not hot.exists()
    assert hotset.prefetch(memory.with_name("missing"), hot) == 0


def test_more_than_a_record_can_hold(memory: Path, hot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many ranges the first are kept, and the record is one that can be read."""
    monkeypatch.setattr(hotset, "_MOST_RANGES", 2)
    with MappingProcess(memory) as process:
        process.write((0, b"x"), (2 * MIB, b"x"), (4 * MIB, b"x"), (6 * MIB, b"x"))
        hotset.record(process.pid, memory, hot)
    assert hot.stat().st_size == 8 * 5
    assert 0 < hotset.prefetch(memory, hot) < 4 * MIB
