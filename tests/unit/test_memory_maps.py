"""The parsers of /proc/PID/maps and smaps, and the identity of a mapped file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.errors import HostCannot, IntegrityError, VmmDied
from coppice.memory.maps import (
    FileIdentity,
    Vma,
    VmaUsage,
    identify,
    likely_identity,
    maps_of,
    parse_maps,
    parse_smaps,
    process_error,
    read_maps,
    read_text,
    smaps_of,
    total_anonymous,
)
from mapping_process import MappingProcess

PAGES = st.integers(0, 2**40).map(lambda page: page * 4096)
KILOBYTES = st.integers(0, 2**30).map(lambda count: count * 1024)
NAMES = st.sampled_from(
    ["", "[heap]", "/var/lib/coppice/memory", "/a b/Rss:   5 kB", "/x (deleted)", "/00-11 rw-p 0 0:0 1"]
)
VMAS = st.builds(
    lambda start, length, mode, offset, major, minor, inode: Vma(
        start, start + length + 4096, mode, offset, FileIdentity(f"{major:02x}:{minor:02x}", inode)
    ),
    *(PAGES, PAGES, st.sampled_from(["rw-p", "rw-s", "r--p", "---p", "r-xp"]), PAGES),
    *(st.integers(0, 4095), st.integers(0, 2**20 - 1), st.integers(0, 2**64 - 1)),
)
USAGES = st.builds(VmaUsage, VMAS, KILOBYTES, KILOBYTES, KILOBYTES)


def header(vma: Vma, name: str) -> str:
    return (
        f"{vma.start:08x}-{vma.end:08x} {vma.permissions} {vma.offset:08x} {vma.file.device} {vma.file.inode}"
        f"{' ' * 20}{name}\n"
    )


def block(usage: VmaUsage, name: str) -> str:
    fields = {
        "Size": usage.vma.length,
        "Rss": usage.rss_bytes,
        "Pss": 1024,
        "Private_Clean": 3072,
        "Private_Dirty": 5120,
        "Anonymous": usage.anonymous_bytes,
        "AnonHugePages": 2048,
        "Swap": usage.swap_bytes,
        "SwapPss": 4096,
    }
    lines = "".join(f"{key + ':':<15} {value // 1024:>8} kB\n" for key, value in fields.items())
    return header(usage.vma, name) + lines + "THPeligible:           0\nVmFlags: rd wr mr mw me ac sd\n"


@given(st.lists(st.tuples(VMAS, NAMES)))
def test_maps_round_trip(vmas: list[tuple[Vma, str]]) -> None:
    """Every mapping line is read back exactly, whatever its file is called."""
    assert parse_maps("".join(header(*vma) for vma in vmas).encode()) == [vma for vma, _ in vmas]


@given(st.lists(st.tuples(USAGES, NAMES)))
def test_smaps_round_trip(usages: list[tuple[VmaUsage, str]]) -> None:
    """Every block is read back exactly: no field is taken from a neighbour, a file name or a longer field name."""
    assert parse_smaps("".join(block(*usage) for usage in usages).encode()) == [usage for usage, _ in usages]


@given(st.lists(st.tuples(USAGES, NAMES)))
def test_a_part_of_smaps_is_that_of_the_whole(usages: list[tuple[VmaUsage, str]]) -> None:
    """What is read of one file, or summed up over all, is what reading every block gives."""
    text = "".join(block(*usage) for usage in usages).encode()
    maps = "".join(header(usage.vma, name) for usage, name in usages).encode()
    for file in {usage.vma.file for usage, _ in usages}:
        assert smaps_of(text, file) == [usage for usage, _ in usages if usage.vma.file == file]
        assert maps_of(maps, file) == [usage.vma for usage, _ in usages if usage.vma.file == file]
    assert total_anonymous(text) == sum(usage.anonymous_bytes + usage.swap_bytes for usage, _ in usages)


@given(st.binary())
def test_parsers_pass_over_garbage(text: bytes) -> None:
    """Lines of a future kernel do not raise."""
    parse_maps(text)
    parse_smaps(text)
    smaps_of(text, FileIdentity("fe:00", 12))
    total_anonymous(text)


def test_maps_and_smaps_agree_on_a_real_process(tmp_path: Path) -> None:
    """Both files of one idle process list the same mappings."""
    (tmp_path / "ram").write_bytes(b"r" * 8192)
    with MappingProcess(tmp_path / "ram") as process:
        assert [usage.vma for usage in parse_smaps(read_text(process.pid, "smaps"))] == read_maps(process.pid)


def test_identity_is_what_another_process_shows(tmp_path: Path) -> None:
    """A file is recognised in another process, and a file of the same contents is not."""
    for name in ("ram", "other"):
        (tmp_path / name).write_bytes(b"r" * 8192)
    with MappingProcess(tmp_path / "ram") as process:
        found = [vma for vma in read_maps(process.pid) if vma.file == identify(tmp_path / "ram")]
        assert [(vma.length, vma.private, vma.offset) for vma in found] == [(8192, True, 0)]
        assert not [vma for vma in read_maps(process.pid) if vma.file == identify(tmp_path / "other")]


def test_the_likely_identity_is_the_true_one_here(tmp_path: Path) -> None:
    """On an ordinary file system the kernel names a mapping's device as stat(2) does, written the same way."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(4096))
    assert likely_identity(path.stat()) == identify(path)


def test_identity_of_what_cannot_be_mapped(tmp_path: Path) -> None:
    """A missing file, an empty one and a symbolic link are told apart."""
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("empty")
    for name, error in (("missing", IntegrityError), ("empty", HostCannot), ("link", HostCannot)):
        with pytest.raises(error):
            identify(tmp_path / name)


def test_ended_process_is_told() -> None:
    """A process that is gone, or ended but not yet reaped, is VmmDied."""
    process = subprocess.Popen((sys.executable, "-I", "-S", "-c", ""))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, still a zombie
    with pytest.raises(VmmDied):
        read_text(process.pid, "smaps")
    process.wait()
    with pytest.raises(VmmDied):
        read_maps(process.pid)


def test_missing_permission_has_a_cure() -> None:
    """Where the kernel forbids the look, the hint names the setting."""
    error = process_error(1, "read it", PermissionError(1, "Operation not permitted"))
    assert isinstance(error, HostCannot)
    assert "ptrace_scope" in str(error)
    assert isinstance(process_error(1, "read it", OSError(5, "Input/output error")), HostCannot)
