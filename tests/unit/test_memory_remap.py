"""A shared mapping becomes private in place: contents stay, the file stops changing, the process notices nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coppice.errors import HostCannot, VmmDied
from coppice.memory import remap
from coppice.memory.maps import identify, read_maps
from coppice.memory.remap import make_private
from mapping_process import MappingProcess

SIZE = 4 << 20


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_writes_before_are_in_the_file_and_writes_after_are_not(ram: Path) -> None:
    """What the process wrote before is in the file; what it writes after is its own; it sees both. It was in a blocking read, which goes on."""
    identity = identify(ram)
    with MappingProcess(ram, "shared") as process:
        process.write((0, b"\xaa\xbb"))
        assert make_private(process.pid, identity) == SIZE
        frozen = ram.read_bytes()
        assert frozen[:2] == b"\xaa\xbb"
        process.write((4096, b"\xcc\xdd"))
        process.fill(8192, 65536, 7)
        assert ram.read_bytes() == frozen
        (vma,) = [vma for vma in read_maps(process.pid) if vma.file == identity]
        assert vma.private
        with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(vma.start)
            seen = memory.read(SIZE)
        assert seen[:2] == b"\xaa\xbb"
        assert seen[4096:4098] == b"\xcc\xdd"
        assert seen[8192 : 8192 + 65536] == b"\x07" * 65536
        assert seen[100_000:] == frozen[100_000:]


def test_nothing_to_do_for_a_private_mapping(ram: Path) -> None:
    """A process that maps the file privately already is left alone."""
    with MappingProcess(ram, "private") as process:
        assert make_private(process.pid, identify(ram)) == 0
        process.write((0, b"\0"))


def test_a_process_that_is_gone(ram: Path) -> None:
    """No such process is an error of its own kind, not a hang."""
    with MappingProcess(ram, "shared") as process:
        pid = process.pid
    with pytest.raises(VmmDied):
        make_private(pid, identify(ram))


def test_nothing_is_replaced_where_the_kernel_may_refuse(
    ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without overcommit a refused mapping would leave the guest without its memory: the caller copies instead."""
    (tmp_path / "overcommit_memory").write_text("2\n")
    monkeypatch.setattr(remap, "_OVERCOMMIT", tmp_path / "overcommit_memory")
    with MappingProcess(ram, "shared") as process:
        before = read_maps(process.pid)
        with pytest.raises(HostCannot):
            make_private(process.pid, identify(ram))
        assert read_maps(process.pid) == before
