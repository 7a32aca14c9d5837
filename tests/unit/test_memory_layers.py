"""Layers of a captured memory: what a capture writes, the map that a restore reads, and what a guest on layers sees."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from coppice.errors import IntegrityError
from coppice.linux.clone import clone_file
from coppice.linux.extents import data_ranges
from coppice.linux.pagemap import PrivateRange
from coppice.linux.remap import lay_over
from coppice.memory import layers
from coppice.memory.capture import PrivateCapture, Taken
from coppice.memory.layers import Extent, covered, flatten, joined, map_of, path_of, ranges_over
from coppice.memory.memfile import check, freeze
from coppice.memory.report import memory_report
from coppice.model import MIB, MemFile, Sharing
from mapping_process import MappingProcess

PAGE = 4096
SIZE = 24 * MIB


class Line:
    """A line of captures, each of a guest that was restored from the one before it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        live = directory / "live"
        with live.open("wb") as file:
            file.truncate(SIZE)
            file.write(random.Random(3).randbytes(6 * MIB))
        self.base = directory / "memory"
        self.contents = bytearray(live.read_bytes())
        self.taken = Taken(freeze(live, self.base), (), None)  # type: ignore[arg-type]  # nothing was captured yet

    def guest(self) -> MappingProcess:
        """A process that was restored from the latest capture."""
        paths = [path_of(self.base, number + 1) for number in range(len(self.taken.layers))]
        guest = MappingProcess(self.base, holding=paths)
        if over := ranges_over(self.base, self.taken.layers):
            lay_over(guest.pid, self.base, over)
        return guest

    def write(self, guest: MappingProcess, *pieces: tuple[int, bytes]) -> None:
        guest.write(*pieces)
        for offset, data in pieces:
            self.contents[offset : offset + len(data)] = data

    def capture(self, guest: MappingProcess, *, layered: bool = True) -> Taken:
        """Capture the guest, and put the new file into place as a machine's directory has it."""
        out = self.base.with_name("memory.new")
        with PrivateCapture(self.base, self.taken.mem_file, out, self.taken.layers, layered=layered) as work:
            work.prepare()
            work.collect(guest.pid)
            self.taken = work.finish()
        out.rename(path_of(self.base, len(self.taken.layers)) if self.taken.layers else self.base)
        return self.taken

    def level(self, *pieces: tuple[int, bytes], layered: bool = True) -> Taken:
        """Restore, write and capture."""
        with self.guest() as guest:
            assert guest.digest() == hashlib.sha256(self.contents).hexdigest()
            self.write(guest, *pieces)
            return self.capture(guest, layered=layered)

    def is_right(self) -> bool:
        """Whether a guest of the latest capture has all that was ever written."""
        with self.guest() as guest:
            return guest.digest() == hashlib.sha256(self.contents).hexdigest()


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path / "machine")


def pages(salt: int, count: int, step: int = 3) -> list[tuple[int, bytes]]:
    """Pieces in scattered pages."""
    generator = random.Random(salt)
    return [((salt * 5 + number * step) * PAGE + 7, generator.randbytes(9)) for number in range(count)]


def test_a_level_writes_what_it_dirtied(line: Line) -> None:
    """Six generations over one base: each guest sees everything, each file has its own pages, no older file changes."""
    kept: dict[Path, tuple[int, int, str]] = {}
    for salt in range(1, 7):
        taken = line.level(*pages(salt, 200), (20 * MIB, os.urandom(MIB)))
        assert taken.stats.kind == "layer"
        assert len(taken.layers) == salt
        assert taken.stats.dirty_bytes == 200 * PAGE + MIB
        assert taken.stats.written_bytes <= 1.2 * taken.stats.dirty_bytes
        newest = path_of(line.base, salt)
        assert newest.stat().st_blocks * 512 <= 1.2 * taken.stats.dirty_bytes
        check(newest, taken.layers[-1])
        for path, was in kept.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns, digest(path)) == was
        kept |= {path: (path.stat().st_ino, path.stat().st_mtime_ns, digest(path)) for path in (line.base, newest)}
        assert line.is_right()
    assert sorted(path.name for path in line.base.parent.iterdir()) == ["memory", *(f"memory.{n}" for n in range(1, 7))]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_zeros_are_not_the_base(line: Line) -> None:
    """Memory that a guest cleared reads as zeros in its forks, though its layer has a hole there and the base has data."""
    with line.guest() as guest:
        guest.fill(MIB, MIB, 0)
        line.contents[MIB : 2 * MIB] = bytes(MIB)
        line.write(guest, (3 * MIB, b"island"))
        taken = line.capture(guest)
    assert taken.stats.kind == "layer"
    with path_of(line.base, 1).open("rb") as file:
        size = taken.layers[0].size_bytes
        written = sum(length for _, length in data_ranges(file.fileno(), size))
    assert written == 2 * PAGE + 2 * 32  # a header, the island and the map; all pages of zeros are holes
    assert size == 2 * PAGE + MIB + 2 * 32
    assert line.is_right()


def test_a_copy_that_fills_or_makes_holes_is_as_good(line: Line) -> None:
    """The map alone says what belongs to a layer."""
    with line.guest() as guest:
        guest.fill(MIB, MIB, 0)
        line.contents[MIB : 2 * MIB] = bytes(MIB)
        line.write(guest, *pages(4, 50))
        taken = line.capture(guest)
    layer = path_of(line.base, 1)
    dense = layer.with_name("dense")
    dense.write_bytes(layer.read_bytes())
    for source in (dense, layer):
        copy = layer.with_name("copy")
        clone_file(source, copy, mode=0o444, reflink=source is layer)
        copy.rename(layer)
        assert map_of(line.base, taken.layers)
        assert line.is_right()


def test_too_many_layers_become_one(line: Line) -> None:
    """The capture after the last possible layer takes in all others; it goes on from there."""
    for salt in range(1, layers.MOST + 1):
        assert line.level(*pages(salt, 40), (12 * MIB, bytes([salt]) * PAGE)).stats.kind == "layer"
    taken = line.level(*pages(20, 40))
    assert (taken.stats.kind, len(taken.layers)) == ("merged", 1)
    assert {extent.layer for extent in map_of(line.base, taken.layers)} == {1}
    assert line.is_right()
    taken = line.level(*pages(21, 40))
    assert (taken.stats.kind, len(taken.layers)) == ("layer", 2)
    assert line.is_right()


def test_layers_that_are_too_large_become_a_mem_file(line: Line) -> None:
    """Half of the guest's memory in layers is enough: the next capture is whole, and has no layers."""
    base = line.taken.mem_file.inode
    assert line.level((0, os.urandom(8 * MIB))).stats.kind == "layer"
    with line.guest() as guest:
        guest.fill(3 * MIB, MIB, 0)  # over data of the layer, and of the base below it
        line.contents[3 * MIB : 4 * MIB] = bytes(MIB)
        line.write(guest, (8 * MIB, os.urandom(5 * MIB)))
        taken = line.capture(guest)
    assert (taken.stats.kind, taken.layers) == ("whole", ())
    assert taken.mem_file.inode != base
    assert line.base.read_bytes() == bytes(line.contents)
    assert line.is_right()


def test_a_map_that_is_too_long_becomes_a_mem_file(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each extent is a mapping, and the kernel allows only so many."""
    monkeypatch.setattr(layers, "MOST_EXTENTS", 64)
    kinds = [line.level(*pages(salt, 12, step=100 + salt)).stats.kind for salt in range(1, 8)]
    assert "whole" in kinds
    assert kinds[0] == "layer"
    assert line.is_right()


def test_a_vmm_that_cannot_map_layers_gets_a_mem_file(line: Line) -> None:
    """Its captures are whole; a memory with layers that comes its way is written as one file."""
    line.level(*pages(1, 100))
    line.level(*pages(2, 100))
    mem_file, written = flatten(line.base, line.taken.layers, line.base.with_name("flat"), reason="it cannot")
    assert line.base.with_name("flat").read_bytes() == bytes(line.contents)
    assert (mem_file.sharing, mem_file.reason) == (Sharing.COPY, "it cannot")
    assert written >= 6 * MIB
    taken = line.level(*pages(3, 100), layered=False)
    assert (taken.stats.kind, taken.layers) == ("whole", ())
    assert line.base.read_bytes() == bytes(line.contents)


def test_an_untouched_guest_makes_an_empty_layer(line: Line) -> None:
    """Nothing was written, and nothing is lost by it."""
    line.level(*pages(1, 10))
    taken = line.level()
    assert (taken.stats.kind, taken.stats.dirty_bytes, len(taken.layers)) == ("layer", 0, 2)
    assert line.is_right()


def test_a_changed_map_is_refused(line: Line) -> None:
    """A restore would put memory where it does not belong."""
    taken = line.level(*pages(1, 10))
    layer = path_of(line.base, 1)
    layer.chmod(0o644)
    with layer.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\1")
    layer.chmod(0o444)
    check(layer, taken.layers[0])
    with pytest.raises(IntegrityError, match="map"):
        ranges_over(line.base, taken.layers)
    with (
        PrivateCapture(line.base, taken.mem_file, line.base.with_name("new"), taken.layers, layered=True) as work,
        pytest.raises(IntegrityError, match="map"),
    ):
        work.prepare()


def test_a_missing_layer_is_noticed_before_anything_is_made(line: Line) -> None:
    """Also one below the topmost."""
    for salt in (1, 2):
        line.level(*pages(salt, 10))
    path_of(line.base, 1).unlink()
    with (
        PrivateCapture(
            line.base, line.taken.mem_file, line.base.with_name("new"), line.taken.layers, layered=True
        ) as work,
        pytest.raises(IntegrityError, match=r"memory\.1 .* missing"),
    ):
        work.prepare()
    assert sorted(path.name for path in line.base.parent.iterdir()) == ["memory", "memory.2"]


def test_a_guest_without_its_layers_is_not_captured(line: Line) -> None:
    """A process that maps the base alone does not have the memory that is recorded."""
    line.level((0, os.urandom(MIB)))
    with MappingProcess(line.base) as guest:
        taken = line.taken
        report = memory_report(guest.pid, taken.mem_file, line.base, [path_of(line.base, 1)])
        assert report.mapped_bytes == SIZE
        out = line.base.with_name("new")
        with PrivateCapture(line.base, taken.mem_file, out, taken.layers, layered=True) as work:
            work.prepare()
            with pytest.raises(IntegrityError, match="layers"):
                work.collect(guest.pid)


def test_pages_of_layers_are_shared_until_they_are_written(line: Line) -> None:
    """The report counts base and layers as shared, and what the guest writes as its own."""
    line.level((0, os.urandom(2 * MIB)), (12 * MIB, os.urandom(MIB)))
    line.level((MIB, os.urandom(2 * MIB)))
    paths = [path_of(line.base, number) for number in (1, 2)]
    with line.guest() as guest:
        guest.touch()
        report = memory_report(guest.pid, line.taken.mem_file, line.base, paths)
        assert (report.mapped_bytes, report.shared_bytes, report.unique_bytes, report.layers) == (SIZE, SIZE, 0, 2)
        guest.write((0, b"x"), (MIB, b"x"), (20 * MIB, b"x"))
        report = memory_report(guest.pid, line.taken.mem_file, line.base, paths)
        assert (report.shared_bytes, report.unique_bytes) == (SIZE - 3 * PAGE, 3 * PAGE)


def ranges(*pairs: tuple[int, int]) -> list[PrivateRange]:
    return [PrivateRange(start, 0, length) for start, length in pairs]


def test_gaps_are_closed_from_the_smallest_on_within_the_budget() -> None:
    """Of equal gaps only as many as the budget allows."""
    found = [Extent(start, length, 1) for start, length in ((0, 4), (5, 4), (12, 4), (17, 4), (22, 4), (60, 4))]
    assert list(joined(found, slack=0, most=9)) == [(0, 4), (5, 4), (12, 4), (17, 4), (22, 4), (60, 4)]
    assert list(joined(found, slack=2, most=9)) == [(0, 9), (12, 9), (22, 4), (60, 4)]
    assert list(joined(found, slack=3, most=9)) == [(0, 9), (12, 14), (60, 4)]
    assert list(joined(found, slack=0, most=2)) == [(0, 26), (60, 4)]
    assert list(joined([], slack=9, most=1)) == []


def test_a_map_over_a_map() -> None:
    """Against a plain model, byte by byte."""
    generator = random.Random(5)
    for _ in range(300):
        model, extents = dict[int, int](), list[Extent]()
        for number in range(1, 5):
            above, at = list[Extent](), generator.randrange(6)
            while at < 60:
                length = generator.randrange(1, 9)
                above.append(Extent(at, length, number))
                at += length + generator.randrange(0, 12)
            extents = covered(extents, above)
            model |= {byte: number for extent in above for byte in range(extent.offset, extent.end)}
            assert {byte: e.layer for e in extents for byte in range(e.offset, e.end)} == model
            assert sum(extent.length for extent in extents) == len(model)
            assert extents == sorted(extents)


def test_the_record_of_a_layer_is_that_of_its_file(line: Line) -> None:
    """Its size has the map in it."""
    taken = line.level(*pages(1, 30))
    (layer,) = taken.layers
    assert isinstance(layer, MemFile)
    assert layer.size_bytes == PAGE + layer.data_bytes + 32 * layer.extents == path_of(line.base, 1).stat().st_size
    assert layer.sharing is Sharing.OWN
    assert path_of(line.base, 1).stat().st_mode & 0o777 == 0o444
    plan = layers.plan([], [], ranges((0, PAGE)), SIZE, layered=True)
    assert (plan.kind, plan.extents, plan.data_bytes) == ("layer", [Extent(0, PAGE, 1, PAGE)], PAGE)


_IN_HALVES = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    half = int(sys.argv[2])
    low = mmap.mmap(file.fileno(), half, access=mmap.ACCESS_COPY)
    apart = mmap.mmap(-1, 1 << 20)
    high = mmap.mmap(file.fileno(), half, access=mmap.ACCESS_COPY, offset=half)
print("ready", flush=True)
sys.stdin.readline()
low[5], high[7] = 1, 2
print("done", flush=True)
sys.stdin.readline()
"""


def test_a_memory_that_is_mapped_in_two_pieces(line: Line) -> None:
    """As Firecracker maps more than 3 GiB: a layer's range over the border is mapped in two parts, and captured as one."""
    half = SIZE // 2
    line.level((half - MIB, os.urandom(2 * MIB)))
    command = (sys.executable, "-I", "-S", "-c", _IN_HALVES, str(line.base), str(half))
    with path_of(line.base, 1).open("rb") as layer:
        held = [layer.fileno()]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=held)
    with process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        lay_over(process.pid, line.base, ranges_over(line.base, line.taken.layers))
        process.stdin.write("write\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        with PrivateCapture(
            line.base, line.taken.mem_file, path_of(line.base, 2), line.taken.layers, layered=True
        ) as work:
            work.prepare()
            assert work.collect(process.pid) == 2 * PAGE
            line.taken = work.finish()
        process.kill()
    line.contents[5], line.contents[half + 7] = 1, 2
    assert line.is_right()
