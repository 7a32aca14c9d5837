"""A shared mapping becomes private in place: contents stay, the file stops changing, the process notices nothing."""

from __future__ import annotations

import os
import signal
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


def killed_after(calls: int, pid: int, ram: Path) -> bool:
    """Whether a tracer of its own that was to be killed after so many calls of ptrace was; else it came to its end."""
    tracer = os.fork()
    if tracer == 0:
        real, made = remap._ptrace, 0

        def counted(request: int, *arguments: object) -> None:
            nonlocal made
            real(request, *arguments)  # type: ignore[arg-type]  # whatever they are
            made += 1
            if made == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        remap._ptrace = counted  # type: ignore[assignment]  # the same but for its type
        os._exit(0 if make_private(pid, identify(ram)) == SIZE else 1)
    _, status = os.waitpid(tracer, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_tracer_may_be_killed_at_any_instant(ram: Path) -> None:
    """After each of its calls: the process goes on with the registers that it had, in the system call that it was in, and sees what it wrote.

    The mapping is then as it was, or private; another tracer may finish it.
    """
    identity, calls, found = identify(ram), 0, set[bool]()
    killed = True
    while killed:
        calls += 1
        with MappingProcess(ram, "shared") as process:
            process.write((0, b"\xaa"))
            killed = killed_after(calls, process.pid, ram)
            process.write((SIZE - 1, b"\xbb"))
            found.add(all(vma.private for vma in read_maps(process.pid) if vma.file == identity))
            make_private(process.pid, identity)
            frozen = ram.read_bytes()
            process.fill(4096, 4096, 7)
            assert ram.read_bytes() == frozen
            assert frozen[0] == 0xAA
    assert calls > 10
    assert found == {True, False}


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
