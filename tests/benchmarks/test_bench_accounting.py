"""Figures read from the kernel are correct."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import accounting
from bench.accounting import Usage
from bench.copying import fill_holes
from coppice.errors import VmmDied
from coppice.linux.extents import data_ranges
from coppice.model import MIB

_STAT = "7 (a b) c) S 1 7 7 0 -1 4194304 100 0 0 0 150 25 9 9 20 0 1 0 12345 1000 10"


def test_cpu_time_is_user_and_system_of_the_process() -> None:
    """The time is fields 14 and 15, after a command name with blanks and parentheses, without the
    children's time.
    """
    assert accounting.parse_cpu_ms(_STAT) == 175 * 1000 / os.sysconf("SC_CLK_TCK")


def test_cpu_time_of_a_process_that_ended_is_an_error() -> None:
    """A VMM that died during a measurement is never reported as cheap."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(VmmDied):
        accounting.cpu_ms(child.pid)


def test_usage_counts_this_process_and_helpers() -> None:
    """The CPU time of a helper that has been waited for counts for its parent."""
    before = Usage.now()
    subprocess.run([sys.executable, "-c", "for _ in range(3_000_000): pass"], check=True)
    spent = before.until(Usage.now())
    assert spent.cpu_ms >= 30


def test_the_page_cache_is_dropped_and_filled(tmp_path: Path) -> None:
    """A cold file has no data in the page cache, and a warm one all of it; holes do not count."""
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(os.urandom(4 * MIB))
        file.flush()
        os.fsync(file.fileno())
    accounting.drop_from_cache(path)
    assert accounting.cached_part(path) < 0.05
    accounting.read_into_cache(path)
    assert accounting.cached_part(path) > 0.95
    assert path.stat().st_blocks * 512 < 8 * MIB


def test_the_mount_that_holds_a_path() -> None:
    """The mount is the longest mount point that is a whole prefix; octal blanks are decoded; the
    root is the last resort.
    """
    mounts = "/dev/a / ext4 rw 0 0\n/dev/b /var btrfs rw 0 0\n/dev/c /var/tmp\\040x xfs rw 0 0\ntmpfs /va tmpfs rw 0 0"
    assert accounting.parse_mounts(mounts, "/var/tmp x/home") == "xfs"
    assert accounting.parse_mounts(mounts, "/var/tmp") == "btrfs"
    assert accounting.parse_mounts(mounts, "/variant") == "ext4"
    assert accounting.parse_mounts("", "/x") == "unknown"


def test_a_full_copy_has_no_holes_and_the_same_content(tmp_path: Path) -> None:
    """The baseline `full-copy` writes every byte of the file once, data first and holes afterwards,
    and changes nothing.
    """
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(9 * MIB + 4096)
        for offset in (0, 3 * MIB):
            file.seek(offset)
            file.write(b"x" * 8192)
    path.chmod(0o444)
    before = path.read_bytes()
    with path.open("rb") as file:
        data = sum(length for _, length in data_ranges(file.fileno(), len(before)))
    assert fill_holes(path) + data == len(before)
    assert path.read_bytes() == before
    assert path.stat().st_blocks * 512 >= len(before)
    assert path.stat().st_mode & 0o777 == 0o444
    assert fill_holes(path) == 0
