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
from coppice.linux.maps import (
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
def test_maps_are_parsed_exactly(vmas: list[tuple[Vma, str]]) -> None:
    """Every mapping line is parsed exactly, whatever its file's name."""
    assert parse_maps("".join(header(*vma) for vma in vmas).encode()) == [vma for vma, _ in vmas]


@given(st.lists(st.tuples(USAGES, NAMES)))
def test_smaps_are_parsed_exactly(usages: list[tuple[VmaUsage, str]]) -> None:
    """Every block is parsed exactly: no field comes from a neighbour, a file name or a longer field
    name.
    """
    assert parse_smaps("".join(block(*usage) for usage in usages).encode()) == [usage for usage, _ in usages]


@given(st.lists(st.tuples(USAGES, NAMES)))
def test_a_partial_read_of_smaps_equals_the_full_one(usages: list[tuple[VmaUsage, str]]) -> None:
    """Reading one file's mappings, or the sums over all, gives the same numbers as reading every
    block.
    """
    text = "".join(block(*usage) for usage in usages).encode()
    maps = "".join(header(usage.vma, name) for usage, name in usages).encode()
    for file in {usage.vma.file for usage, _ in usages}:
        assert smaps_of(text, file) == [usage for usage, _ in usages if usage.vma.file == file]
        assert maps_of(maps, file) == [usage.vma for usage, _ in usages if usage.vma.file == file]
    assert total_anonymous(text) == sum(usage.anonymous_bytes + usage.swap_bytes for usage, _ in usages)


@given(st.binary())
def test_parsers_skip_garbage(text: bytes) -> None:
    """Unknown lines of a future kernel do not raise."""
    parse_maps(text)
    parse_smaps(text)
    smaps_of(text, FileIdentity("fe:00", 12))
    total_anonymous(text)


def test_maps_and_smaps_agree_on_a_real_process(tmp_path: Path) -> None:
    """Both files of one idle process list the same mappings."""
    (tmp_path / "ram").write_bytes(b"r" * 8192)
    with MappingProcess(tmp_path / "ram") as process:
        assert [usage.vma for usage in parse_smaps(read_text(process.pid, "smaps"))] == read_maps(process.pid)


def test_a_file_is_identified_in_another_process(tmp_path: Path) -> None:
    """A file is recognised in another process's mappings, and another file with the same contents
    is not.
    """
    for name in ("ram", "other"):
        (tmp_path / name).write_bytes(b"r" * 8192)
    with MappingProcess(tmp_path / "ram") as process:
        found = [vma for vma in read_maps(process.pid) if vma.file == identify(tmp_path / "ram")]
        assert [(vma.length, vma.private, vma.offset) for vma in found] == [(8192, True, 0)]
        assert not [vma for vma in read_maps(process.pid) if vma.file == identify(tmp_path / "other")]


def test_the_likely_identity_is_correct_on_ordinary_file_systems(tmp_path: Path) -> None:
    """On an ordinary file system the kernel shows a mapping's device as stat(2) does, in the same
    notation.
    """
    path = tmp_path / "ram"
    path.write_bytes(bytes(4096))
    assert likely_identity(path.stat()) == identify(path)


def test_paths_that_cannot_be_mapped_have_no_identity(tmp_path: Path) -> None:
    """A missing file, an empty file and a symbolic link are refused."""
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("empty")
    for name, error in (("missing", IntegrityError), ("empty", HostCannot), ("link", HostCannot)):
        with pytest.raises(error):
            identify(tmp_path / name)


def test_an_ended_process_is_reported() -> None:
    """A process that has ended, even if it is not reaped yet, raises VmmDied."""
    process = subprocess.Popen((sys.executable, "-I", "-S", "-c", ""))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, still a zombie
    with pytest.raises(VmmDied):
        read_text(process.pid, "smaps")
    process.wait()
    with pytest.raises(VmmDied):
        read_maps(process.pid)


def test_a_missing_permission_has_a_hint() -> None:
    """If the kernel denies access, the hint names the setting."""
    error = process_error(1, "read it", PermissionError(1, "Operation not permitted"))
    assert isinstance(error, HostCannot)
    assert "ptrace_scope" in str(error)
    assert isinstance(process_error(1, "read it", OSError(5, "Input/output error")), HostCannot)
