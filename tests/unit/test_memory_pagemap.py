"""Private pages are found in two ways, with the same result."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.errors import VmmDied
from coppice.linux import pagemap
from coppice.linux.maps import FileIdentity, Vma, identify, read_maps, read_text, smaps_of
from coppice.linux.pagemap import PrivateRange, merge, private_ranges, private_runs, usages
from mapping_process import MappingProcess

PAGE = 4096
PAGES = 3000


@pytest.fixture(scope="module")
def ram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pagemap") / "ram"
    path.write_bytes(random.Random(5).randbytes(PAGES * PAGE))
    return path


@pytest.fixture
def process(ram: Path) -> Iterator[MappingProcess]:
    with MappingProcess(ram) as running:
        yield running


def ram_vmas(process: MappingProcess, ram: Path) -> list[Vma]:
    identity = identify(ram)
    return [vma for vma in read_maps(process.pid) if vma.file == identity]


@contextmanager
def no_ioctl() -> Iterator[None]:
    """Have the kernel refuse the ioctl as one before Linux 6.7 does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagemap, "PAGEMAP_SCAN", 0xC0606611)
        yield


METHODS = pytest.mark.parametrize("method", [nullcontext, no_ioctl], ids=["pagemap_scan", "pagemap"])
Method = Callable[[], AbstractContextManager[None]]


def pages_of(ranges: list[PrivateRange]) -> set[int]:
    return {page for found in ranges for page in range(found.offset // PAGE, (found.offset + found.length) // PAGE)}


@settings(max_examples=20, deadline=None)
@given(writes=st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 40)), max_size=30))
def test_both_methods_find_exactly_the_written_pages(ram: Path, writes: list[tuple[int, int]]) -> None:
    """On a real process each method finds exactly the written pages."""
    written: set[int] = set()
    with MappingProcess(ram) as process:
        for page, wanted in writes:
            count = min(wanted, PAGES - page)
            process.fill(page * PAGE, count * PAGE, 7)
            written.update(range(page, page + count))
        vmas = ram_vmas(process, ram)
        by_scan = private_ranges(process.pid, vmas)
        with no_ioctl():
            by_read = private_ranges(process.pid, vmas)
        counted = usages(process.pid, vmas)
        by_smaps = smaps_of(read_text(process.pid, "smaps"), identify(ram))
    assert by_scan == by_read
    assert pages_of(by_scan) == written
    assert counted == by_smaps
    assert sum(usage.anonymous_bytes for usage in by_smaps) == len(written) * PAGE


@METHODS
def test_read_pages_are_not_private(process: MappingProcess, ram: Path, method: Method) -> None:
    """Pages that were only read still belong to the file; the offsets are those of the written
    pages.
    """
    process.touch()
    process.write((5 * PAGE + 17, b"x"))
    (vma,) = ram_vmas(process, ram)
    with method():
        ranges = private_ranges(process.pid, [vma])
    assert ranges == [PrivateRange(5 * PAGE, vma.start + 5 * PAGE, PAGE)]


@METHODS
def test_results_in_several_parts_are_joined(
    process: MappingProcess, ram: Path, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full result vector or the end of a read does not end the scan or split a range."""
    monkeypatch.setattr(pagemap, "_REGIONS", 3)
    monkeypatch.setattr(pagemap, "_READ_BYTES", 8 * 7)
    process.write(*((page * PAGE, b"w") for page in range(0, 100, 2)))
    process.fill(200 * PAGE, 50 * PAGE, 1)
    with method():
        ranges = private_ranges(process.pid, ram_vmas(process, ram))
    assert [found.offset // PAGE for found in ranges] == [*range(0, 100, 2), 200]
    assert ranges[-1].length == 50 * PAGE


@pytest.mark.parametrize("count", [511, 512, 513, 600, 1024, 1400])
def test_no_range_is_reported_twice(process: MappingProcess, ram: Path, count: int) -> None:
    """The kernel's `walk_end` is wrong for more regions than its buffer holds but fewer than
    requested.
    """
    process.write(*((page * 2 * PAGE, b"w") for page in range(count)))
    ranges = private_ranges(process.pid, ram_vmas(process, ram))
    assert [found.offset // PAGE for found in ranges] == [page * 2 for page in range(count)]


def test_an_old_kernel_falls_back_to_the_page_map(process: MappingProcess, ram: Path) -> None:
    """A kernel without the ioctl is served through the page map."""
    process.write((0, b"w"))
    with no_ioctl():
        assert len(private_ranges(process.pid, ram_vmas(process, ram))) == 1
        assert usages(process.pid, ram_vmas(process, ram)) is None


def test_a_mapping_in_two_pieces_keeps_file_offsets(process: MappingProcess, ram: Path) -> None:
    """The offsets are the file's, even in a mapping that does not begin at the file's start."""
    process.write((10 * PAGE, b"w"), (2000 * PAGE, b"w"))
    (vma,) = ram_vmas(process, ram)
    middle = vma.start + 1000 * PAGE
    halves = [vma._replace(start=middle, offset=1000 * PAGE), vma._replace(end=middle)]
    assert private_ranges(process.pid, halves) == private_ranges(process.pid, [vma])


def test_an_ended_process_is_reported(ram: Path) -> None:
    """A process that has ended raises VmmDied instead of reporting no private pages."""
    with MappingProcess(ram) as process:
        vmas = ram_vmas(process, ram)
    with pytest.raises(VmmDied):
        private_ranges(process.pid, vmas)


def test_a_missing_mapping_has_no_private_pages(process: MappingProcess) -> None:
    """Both methods find no pages in a hole of the address space."""
    nowhere = Vma(4096, 4096 * 16, "rw-p", 0, FileIdentity("00:00", 0))
    assert private_ranges(process.pid, [nowhere]) == []
    with no_ioctl():
        assert private_ranges(process.pid, [nowhere]) == []


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_private_runs_agree_with_the_definition(entries: list[int]) -> None:
    """A page is private if it is present or swapped and does not belong to a file. Runs are maximal
    and in order.
    """
    raw = b"".join(entry.to_bytes(8, "little") for entry in entries)
    expected = [bool(entry >> 62) and not entry >> 61 & 1 for entry in entries]
    found = [False] * len(entries)
    last_end = -1
    for start, count in private_runs(raw):
        assert start > last_end
        last_end = start + count
        found[start:last_end] = [True] * count
    assert found == expected


@given(st.lists(st.integers(1, 5), max_size=40), st.lists(st.integers(0, 2), min_size=40, max_size=40))
def test_merge_joins_only_adjacent_runs(lengths: list[int], gaps: list[int]) -> None:
    """Merging keeps the covered set, and no two runs of the result touch."""
    runs, position = [], 0
    for length, gap in zip(lengths, gaps, strict=False):
        position += gap
        runs.append((position, position + length))
        position += length
    merged = list(merge(runs))
    covered = {point for start, end in runs for point in range(start, end)}
    assert {point for start, end in merged for point in range(start, end)} == covered
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))
