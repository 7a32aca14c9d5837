"""Pages are copied before the pause, while the guest writes: the capture is the memory of the pause,
to the byte, and all goes on as before if writes cannot be observed.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from coppice.errors import HostCannot, VmmDied
from coppice.linux import pagemap, tracing
from coppice.linux.maps import identify, private_parts, read_text, spans_of
from coppice.linux.pagemap import PrivateRange
from coppice.linux.written import WriteObserver
from coppice.memory import staging
from coppice.memory.capture import PrivateCapture, Taken
from coppice.memory.layers import Memory, map_of
from coppice.memory.memfile import freeze
from coppice.memory.staging import Staging
from coppice.model import MIB, MemFile
from mapping_process import MappingProcess

PAGE = 4096
SIZE = 24 * MIB


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, MemFile]:
    live = tmp_path / "live"
    live.write_bytes(random.Random(3).randbytes(6 * MIB) + bytes(SIZE - 6 * MIB))
    path = tmp_path / "memory"
    return path, freeze(live, path)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each copy."""
    real, found = Staging.take, list[int]()

    def take(self: Staging, pid: int, ranges: Sequence[PrivateRange], *, last: bool = True) -> None:
        found.append(sum(each.length for each in ranges))
        real(self, pid, ranges, last=last)

    monkeypatch.setattr(Staging, "take", take)
    return found


@pytest.fixture
def guest(base: tuple[Path, MemFile]) -> Iterator[MappingProcess]:
    with MappingProcess(base[0]) as process:
        process.fill(8 * MIB, 8 * MIB, 7)
        process.fill(0, 3 * PAGE, 0)
        yield process


def capture_of(base: tuple[Path, MemFile], *, layered: bool = True, observable: bool = True) -> PrivateCapture:
    path, mem = base
    return PrivateCapture(path, mem, path.with_name("new"), layered=layered, observable=observable)


def seen(guest: MappingProcess, path: Path) -> bytes:
    """Return what the guest sees of its memory."""
    (ram,) = spans_of(private_parts(read_text(guest.pid, "maps"), [identify(path)]), lambda part: part.offset)
    with Path(f"/proc/{guest.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(ram.start)
        contents = memory.read(SIZE)
    assert len(contents) == SIZE
    return contents


def captured(path: Path, made: Taken) -> bytes:
    """Return the contents of a captured memory."""
    if not made.layers:
        return path.with_name("new").read_bytes()
    path.with_name("new").rename(path.with_name("memory.1"))
    contents = bytearray()
    with Memory(path, map_of(path, made.layers), 1) as memory:
        while len(contents) < SIZE:
            contents += memory.read(len(contents), 0, SIZE)
    return bytes(contents)


@pytest.mark.parametrize("limit", [256 * MIB, 7 * MIB + PAGE, PAGE], ids=["in memory", "in both", "in a file"])
@pytest.mark.parametrize("seed", range(4))
def test_the_capture_is_the_memory_of_the_pause(
    base: tuple[Path, MemFile], guest: MappingProcess, monkeypatch: pytest.MonkeyPatch, limit: int, seed: int
) -> None:
    """Whatever the guest writes at which time: before, between the passes, and after the pause."""
    monkeypatch.setattr(staging, "_IN_MEMORY_BYTES", limit)
    path, _ = base
    choices = random.Random(seed)
    with capture_of(base, layered=bool(seed % 2)) as work:
        guest.churn(seed)
        work.prepare()
        for _ in range(choices.randint(1, 3)):
            assert work.copy_ahead(guest.pid)
        guest.halt()
        if choices.random() < 0.5:
            guest.write((choices.randrange(SIZE - 3), b"end"))
        work.collect(guest.pid)
        expected = seen(guest, path)
        guest.churn(seed + 100)
        made = work.finish()
        guest.halt()
    assert captured(path, made) == expected


def test_the_pause_is_for_the_pages_written_meanwhile(
    base: tuple[Path, MemFile], guest: MappingProcess, taken: list[int]
) -> None:
    """All pages are captured, and few of them are copied while the guest is paused."""
    with capture_of(base) as work:
        work.prepare()
        assert work.copy_ahead(guest.pid)
        assert taken == [8 * MIB + 3 * PAGE, 0]
        guest.write((8 * MIB, b"again"), (20 * MIB, b"first"))
        assert work.collect(guest.pid) == 8 * MIB + 4 * PAGE
        assert taken[2:] == [2 * PAGE]
        expected = seen(guest, base[0])
        made = work.finish()
        assert made.stats.dirty_bytes == 8 * MIB + 4 * PAGE
    assert captured(base[0], made) == expected


def test_few_pages_are_copied_in_the_pause(base: tuple[Path, MemFile], taken: list[int]) -> None:
    """To observe the guest would take as long."""
    with capture_of(base) as work, MappingProcess(base[0]) as guest:
        work.prepare()
        guest.fill(0, 8 * MIB - PAGE, 7)
        assert not work.copy_ahead(guest.pid)
        assert work.collect(guest.pid) == 8 * MIB - PAGE
        assert taken == [8 * MIB - PAGE]


def test_a_guest_that_writes_faster_than_it_is_copied(
    base: tuple[Path, MemFile], guest: MappingProcess, taken: list[int]
) -> None:
    """The passes end."""
    with capture_of(base) as work:
        work.prepare()
        guest.churn(1)
        assert work.copy_ahead(guest.pid)
        guest.halt()
        assert len(taken) <= 3
        work.collect(guest.pid)
        expected = seen(guest, base[0])
        made = work.finish()
    assert captured(base[0], made) == expected


def test_a_later_collect_defines_the_instant(base: tuple[Path, MemFile], guest: MappingProcess) -> None:
    """A pause may be repeated: the last one counts. Discarded pages are the base's again."""
    with capture_of(base) as work:
        work.prepare()
        assert work.copy_ahead(guest.pid)
        guest.write((9 * MIB, b"early"))
        guest.discard(10 * MIB, 2 * PAGE)
        work.collect(guest.pid)
        guest.write((9 * MIB, b"later"), (10 * MIB + PAGE, b"more"))
        guest.discard(12 * MIB, MIB)
        work.collect(guest.pid)
        expected = seen(guest, base[0])
        guest.fill(0, SIZE, 9)
        made = work.finish()
    assert captured(base[0], made) == expected


def test_nothing_observes_the_guest_afterwards(base: tuple[Path, MemFile], guest: MappingProcess) -> None:
    """Neither after a capture nor after one that was aborted: the next one can."""
    for end in (PrivateCapture.finish, PrivateCapture.abort, PrivateCapture.finish):
        with capture_of(base) as work:
            work.prepare()
            assert work.copy_ahead(guest.pid)
            work.collect(guest.pid)
            end(work)
            base[0].with_name("new").unlink(missing_ok=True)


@pytest.mark.parametrize("refusal", ["driver", "tracing", "descriptor", "other", "page map", "page map at the pause"])
def test_all_pages_are_copied_in_the_pause_if_writes_cannot_be_observed(
    base: tuple[Path, MemFile], guest: MappingProcess, monkeypatch: pytest.MonkeyPatch, taken: list[int], refusal: str
) -> None:
    """Whatever refuses it, and whenever: the capture is complete."""
    other = None

    def refuse(*_: object) -> None:
        raise HostCannot("the VMM cannot be traced: no", hint="run as root")

    with capture_of(base, observable=refusal != "driver") as work:
        work.prepare()
        limit = resource.prlimit(guest.pid, resource.RLIMIT_NOFILE)
        if refusal == "tracing":
            monkeypatch.setattr(tracing, "ptrace", refuse)
        elif refusal == "descriptor":
            resource.prlimit(guest.pid, resource.RLIMIT_NOFILE, (0, limit[1]))
        elif refusal == "other":
            spans = spans_of(private_parts(read_text(guest.pid, "maps"), [identify(base[0])]), lambda part: part.offset)
            other = WriteObserver(guest.pid, spans)
        elif refusal == "page map":
            monkeypatch.setattr(pagemap, "PAGEMAP_SCAN", pagemap.PAGEMAP_SCAN + 1)
        assert work.copy_ahead(guest.pid) is (refusal == "page map at the pause")
        monkeypatch.setattr(pagemap, "PAGEMAP_SCAN", pagemap.PAGEMAP_SCAN + 1)
        resource.prlimit(guest.pid, resource.RLIMIT_NOFILE, limit)
        guest.write((8 * MIB, b"again"), (20 * MIB, b"first"))
        assert not work.copy_ahead(guest.pid)
        assert work.collect(guest.pid) == taken[-1] == 8 * MIB + 4 * PAGE
        expected = seen(guest, base[0])
        made = work.finish()
    assert captured(base[0], made) == expected
    if other is not None:
        other.close()


def test_a_guest_that_ends_meanwhile_is_an_error(base: tuple[Path, MemFile]) -> None:
    """It has no memory that could be copied."""
    with capture_of(base) as work:
        work.prepare()
        with MappingProcess(base[0]) as guest:
            guest.fill(0, 8 * MIB, 7)
            assert work.copy_ahead(guest.pid)
        with pytest.raises(VmmDied):
            work.copy_ahead(guest.pid)
    assert [file.name for file in base[0].parent.iterdir()] == ["memory"]
