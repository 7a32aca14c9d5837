"""The memory cost of a guest, measured on real processes, and the detection of a driver that
silently copied.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coppice.errors import IntegrityError, VmmDied
from coppice.linux import pagemap
from coppice.linux.maps import FileIdentity, Vma, VmaUsage
from coppice.memory.memfile import freeze, link
from coppice.memory.report import Backing, classify, memory_report
from coppice.model import MIB, MemFile, Sharing
from mapping_process import MappingProcess
from memory_helpers import mapping_is_shared

SIZE = 16 * MIB


@pytest.fixture(autouse=True, params=["of 6.7", "older"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with and without PAGEMAP_SCAN: without it the report is read from smaps and
    must be the same.
    """
    if request.param == "older":
        monkeypatch.setattr(pagemap, "PAGEMAP_SCAN", 0xC0606611)


def ram_file(path: Path) -> Path:
    path.write_bytes(b"guest ram " * (SIZE // 10) + bytes(SIZE % 10))
    return path


@pytest.fixture
def fork(tmp_path: Path) -> tuple[Path, MemFile]:
    mem = freeze(ram_file(tmp_path / "live"), tmp_path / "memory")
    own, _ = link(tmp_path / "memory", tmp_path / "fork", mem)
    return tmp_path / "fork", own


def test_written_pages_are_unique(fork: tuple[Path, MemFile]) -> None:
    """Read pages count as shared even if no other process maps them, written pages are unique, and
    untouched pages cost nothing.
    """
    path, mem = fork
    with MappingProcess(path) as vmm:
        fresh = memory_report(vmm.pid, mem, path)
        assert (fresh.unique_bytes, fresh.mapped_bytes) == (0, SIZE)
        vmm.touch()
        vmm.fill(MIB, 3 * MIB, 1)
        vmm.touch()  # again: a write may unmap the read pages of the same huge page
        report = memory_report(vmm.pid, mem, path)
    assert report.unique_bytes == 3 * MIB
    assert report.shared_bytes == SIZE - 3 * MIB
    assert (report.inode, report.link_count, report.sharing) == (mem.inode, 2, Sharing.HARDLINK)


def test_the_overhead_excludes_guest_ram(fork: tuple[Path, MemFile]) -> None:
    """The VMM's own private memory is counted without guest RAM."""
    path, mem = fork
    with MappingProcess(path) as vmm:
        before = memory_report(vmm.pid, mem, path).vmm_overhead_bytes
        vmm.fill(0, 8 * MIB, 1)
        after = memory_report(vmm.pid, mem, path).vmm_overhead_bytes
    assert 0 < before < 12 * MIB
    assert abs(after - before) < 2 * MIB


def test_a_first_boot_owns_its_file(tmp_path: Path) -> None:
    """If guest RAM is the instance's own file, mapped shared, the unique bytes are the file's
    allocated bytes.
    """
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with MappingProcess(path, "shared") as vmm:
        vmm.fill(0, 2 * MIB, 1)
        report = memory_report(vmm.pid, None, path)
        allocated = path.stat().st_blocks * 512
    assert 2 * MIB <= allocated < 3 * MIB
    assert (report.unique_bytes, report.shared_bytes, report.mapped_bytes) == (allocated, 0, SIZE)
    assert report.sharing is Sharing.OWN


def test_a_silent_copy_is_detected(fork: tuple[Path, MemFile]) -> None:
    """For a driver that claims to share but copied, the report says copy and counts every byte as
    unique.
    """
    path, mem = fork
    with MappingProcess(path, "copy") as vmm:
        assert not mapping_is_shared(vmm.pid, path, mem)
        report = memory_report(vmm.pid, mem, path)
    assert report.sharing is Sharing.COPY
    assert report.unique_bytes >= SIZE
    assert report.shared_bytes == 0


def test_sharing_means_the_expected_inode(fork: tuple[Path, MemFile], tmp_path: Path) -> None:
    """Only a private mapping of the whole captured inode counts; equal bytes in another file do
    not.
    """
    path, mem = fork
    with MappingProcess(path) as vmm:
        assert mapping_is_shared(vmm.pid, path, mem)
        assert not mapping_is_shared(vmm.pid, path, msgspec.structs.replace(mem, size_bytes=2 * SIZE))
        assert not mapping_is_shared(vmm.pid, path, msgspec.structs.replace(mem, inode=mem.inode + 1))
        assert not mapping_is_shared(vmm.pid, ram_file(tmp_path / "other"), mem)
    own = freeze(ram_file(tmp_path / "live"), tmp_path / "own")
    (tmp_path / "own").chmod(0o644)
    with MappingProcess(tmp_path / "own", "shared") as vmm:
        assert not mapping_is_shared(vmm.pid, tmp_path / "own", own)


def test_a_parked_instance_has_no_resident_memory(fork: tuple[Path, MemFile]) -> None:
    """Without a process the report shows the file and its links, and no memory."""
    path, mem = fork
    report = memory_report(None, mem, path)
    assert (report.mapped_bytes, report.shared_bytes, report.unique_bytes, report.vmm_overhead_bytes) == (SIZE, 0, 0, 0)
    assert (report.inode, report.link_count, report.sharing) == (mem.inode, 2, Sharing.HARDLINK)


def test_a_boot_without_a_file_is_all_unique(tmp_path: Path) -> None:
    """Anonymous guest RAM is all unique. This does not count as failed sharing, because there was
    no file to share.
    """
    path = ram_file(tmp_path / "memory")
    with MappingProcess(path, "copy") as vmm:
        path.unlink()
        report = memory_report(vmm.pid, None, path, memory_bytes=SIZE)
    assert (report.sharing, report.inode, report.link_count) == (Sharing.OWN, None, 0)
    assert report.unique_bytes >= SIZE


def test_a_missing_process_or_file_is_an_error(fork: tuple[Path, MemFile]) -> None:
    """A process that ended and a missing file raise errors instead of reporting zeros."""
    path, mem = fork
    with MappingProcess(path) as vmm:
        pass
    with pytest.raises(VmmDied):
        memory_report(vmm.pid, mem, path)
    with pytest.raises(VmmDied):
        mapping_is_shared(vmm.pid, path, mem)
    path.unlink()
    with pytest.raises(IntegrityError):
        memory_report(None, mem, path)


def usage(start: int, length: int, permissions: str, inode: int, rss: int) -> VmaUsage:
    return VmaUsage(Vma(start, start + length, permissions, 0, FileIdentity("00:10", inode)), rss, rss, 0)


def test_a_translation_cache_is_not_guest_ram() -> None:
    """Of several large mappings, the one with the guest's exact size is its RAM; without such a
    mapping there is none.
    """
    cache, ram, heap = (
        usage(0, 4 * SIZE, "rwxp", 0, 99),
        usage(8 * SIZE, SIZE, "rw-p", 0, 5),
        usage(10 * SIZE, 4096, "rw-p", 0, 1),
    )
    reserve = usage(20 * SIZE, 9 * SIZE, "---p", 0, 0)
    found = classify([cache, ram, heap, reserve], [FileIdentity("00:10", 77)], SIZE)
    assert found == (Backing.COPY, [ram])
    assert classify([heap, reserve], [FileIdentity("00:10", 77)], SIZE) == (Backing.NONE, [])
