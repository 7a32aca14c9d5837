"""A shared mapping becomes private in place: its contents stay, the file no longer changes, and the
process keeps running. Layers are laid over a private one: all of them, or the process ends.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coppice.errors import HostCannot, IntegrityError, VmmDied, VmmError
from coppice.linux import remap
from coppice.linux.maps import identify, read_maps
from coppice.linux.remap import Layer, lay_over, make_private
from mapping_process import MappingProcess
from memory_helpers import die_after

SIZE = 4 << 20


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_only_writes_before_the_remap_are_in_the_file(ram: Path) -> None:
    """Writes before the remap are in the file and later ones are private; the process sees both.
    The blocking read that it was in continues.
    """
    identity = identify(ram)
    with MappingProcess(ram, "shared") as process:
        process.write((0, b"\xaa\xbb"))
        assert make_private(process.pid, ram) == SIZE
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


def test_a_descriptor_is_identified_by_more_than_its_inode_number(ram: Path) -> None:
    """A socket, or a file on another file system, may have the mem-file's inode number: mapping it
    would lose the guest's memory.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, ram.open("rb") as opened, Path("/proc/self/stat").open("rb") as other:
        assert remap._open_descriptor(os.getpid(), os.fstat(opened.fileno())) == opened.fileno()
        for namesake in (ours.fileno(), other.fileno()):
            fields = list(os.fstat(opened.fileno()))
            fields[stat.ST_INO] = os.fstat(namesake).st_ino
            with pytest.raises(VmmError, match="does not have its mem-file open"):
                remap._open_descriptor(os.getpid(), os.stat_result(fields))


def killed_after(calls: int, pid: int, ram: Path) -> bool:
    """Run a tracer in a child that is killed after this many ptrace calls; return whether it was
    killed before it finished.
    """
    tracer = os.fork()
    if tracer == 0:
        die_after(calls)
        os._exit(0 if make_private(pid, ram) == SIZE else 1)
    _, status = os.waitpid(tracer, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_tracer_may_be_killed_at_any_instant(ram: Path) -> None:
    """After any number of its calls the process continues with its registers and its system call,
    and sees its own writes.

    The mapping is then unchanged or private, and another tracer may finish it.
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
            make_private(process.pid, ram)
            frozen = ram.read_bytes()
            process.fill(4096, 4096, 7)
            assert ram.read_bytes() == frozen
            assert frozen[0] == 0xAA
    assert calls > 10
    assert found == {True, False}


def test_a_private_mapping_is_left_alone(ram: Path) -> None:
    """There is nothing to do for a process that already maps the file privately."""
    with MappingProcess(ram, "private") as process:
        assert make_private(process.pid, ram) == 0
        process.write((0, b"\0"))


def test_a_missing_process_is_an_error(ram: Path) -> None:
    """A missing process raises its own kind of error and does not hang."""
    with MappingProcess(ram, "shared") as process:
        pid = process.pid
    with pytest.raises(VmmDied):
        make_private(pid, ram)


def test_nothing_is_replaced_if_the_kernel_may_refuse(
    ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without overcommit a refused mapping would leave the guest without its memory, so the caller
    copies instead.
    """
    (tmp_path / "overcommit_memory").write_text("2\n")
    monkeypatch.setattr(remap, "_OVERCOMMIT", tmp_path / "overcommit_memory")
    with MappingProcess(ram, "shared") as process:
        before = read_maps(process.pid)
        with pytest.raises(HostCannot):
            make_private(process.pid, ram)
        assert read_maps(process.pid) == before


@pytest.fixture
def over(ram: Path) -> tuple[Layer, ...]:
    """Two layers in alternating pages, and a base between them."""
    for name in ("memory.1", "memory.2"):
        ram.with_name(name).write_bytes(os.urandom(SIZE + 24))
    return tuple(
        Layer(f"memory.{1 + number % 2}", number * 12288, 8192, SIZE - (number + 1) * 12288)
        for number in range(SIZE // 12288)
    )


def composed(ram: Path, over: tuple[Layer, ...]) -> str:
    """The digest of what a process on these layers sees."""
    contents = bytearray(ram.read_bytes())
    for name, offset, length, position in over:
        contents[offset : offset + length] = ram.with_name(name).read_bytes()[position : position + length]
    return hashlib.sha256(contents).hexdigest()


def holding(ram: Path, *names: str) -> MappingProcess:
    return MappingProcess(ram, holding=[ram.with_name(name) for name in names])


def test_layers_are_laid_over_a_base(ram: Path, over: tuple[Layer, ...]) -> None:
    """The process sees each range where it belongs, goes on in its system call, and writes to pages of its own."""
    before = [path.read_bytes() for path in (ram, ram.with_name("memory.1"), ram.with_name("memory.2"))]
    with holding(ram, "memory.1", "memory.2") as process:
        lay_over(process.pid, ram, over)
        assert process.digest() == composed(ram, over)
        process.fill(0, SIZE, 7)
        assert process.digest() == hashlib.sha256(b"\x07" * SIZE).hexdigest()
    assert before == [path.read_bytes() for path in (ram, ram.with_name("memory.1"), ram.with_name("memory.2"))]


def test_the_process_keeps_its_signals(ram: Path, over: tuple[Layer, ...]) -> None:
    """One that comes while the layers are laid is handled afterwards, and none is blocked for good."""
    with holding(ram, "memory.1", "memory.2") as process:
        blocked = _status(process.pid, "SigBlk")
        os.kill(process.pid, signal.SIGWINCH)  # ignored by default
        lay_over(process.pid, ram, over)
        assert _status(process.pid, "SigBlk") == blocked
        assert process.digest() == composed(ram, over)
        os.kill(process.pid, signal.SIGTERM)
        _, status = os.waitpid(process.pid, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM


def _status(pid: int, field: str) -> str:
    return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))


@pytest.mark.parametrize("fault", ["not open", "beyond the base", "not mapped"])
def test_a_process_without_all_of_its_layers_is_ended(ram: Path, over: tuple[Layer, ...], fault: str) -> None:
    """It would run on a mixed memory. Its exit status is left to the waiter."""
    names = ["memory.1"] if fault == "not open" else ["memory.1", "memory.2"]
    if fault == "beyond the base":
        over = (*over, Layer("memory.1", SIZE - 4096, 8192, 0))
    with MappingProcess(
        ram, "shared" if fault == "not mapped" else "private", holding=[ram.with_name(name) for name in names]
    ) as process:
        with pytest.raises((IntegrityError, VmmError)):
            lay_over(process.pid, ram, over)
        _, status = os.waitpid(process.pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_tracer_that_is_killed_takes_a_half_made_memory_with_it(ram: Path, over: tuple[Layer, ...]) -> None:
    """After each of its calls: the process has all of its layers, or it ends."""
    calls, whole = 0, set[bool]()
    killed = True
    while killed:
        calls += 1
        with holding(ram, "memory.1", "memory.2") as process:
            tracer = os.fork()
            if tracer == 0:
                die_after(calls)
                lay_over(process.pid, ram, over)
                os._exit(0)
            killed = os.waitpid(tracer, 0)[1] != 0
            descriptor = os.pidfd_open(process.pid)
            ended = bool(select.select([descriptor], [], [], 0.2)[0]) if killed else False
            os.close(descriptor)
            if not ended and len(read_maps(process.pid)) > len(over):
                assert process.digest() == composed(ram, over)
                whole.add(True)
            else:
                whole.add(False)
    assert calls > 10
    assert whole == {True, False}


_LATER = """
import hashlib, mmap, sys
path, size = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
file = open(path, "rb")
half = size // 2
parts = [mmap.mmap(file.fileno(), half, access=mmap.ACCESS_COPY, offset=offset) for offset in (0, half)]
digest = hashlib.sha256()
for part in parts:
    digest.update(part)
print(digest.hexdigest(), flush=True)
sys.stdin.readline()
"""


def test_layers_are_there_before_the_process_reads_what_it_maps(ram: Path, over: tuple[Layer, ...]) -> None:
    """For a VMM that maps its memory when it is asked to, here in two pieces, and reads it at once."""
    held = [os.open(ram.with_name(name), os.O_RDONLY) for name in ("memory.1", "memory.2")]
    command = (sys.executable, "-I", "-S", "-c", _LATER, str(ram), str(SIZE))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=held) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        watched = threading.Event()
        failed: list[BaseException] = []

        def lay() -> None:
            try:
                remap.lay_over_when_mapped(process.pid, ram, SIZE, over, watched.set)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=lay)
        thread.start()
        assert watched.wait(10)
        process.stdin.write("map\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == composed(ram, over)
        thread.join(10)
        assert not thread.is_alive()
        assert failed == []
        process.kill()
    for descriptor in held:
        os.close(descriptor)


def test_the_wait_for_a_mapping_ends_with_the_process(ram: Path, over: tuple[Layer, ...]) -> None:
    """A VMM that refuses to map its memory is ended by its driver."""
    with MappingProcess(ram, "copy") as process:
        watched = threading.Event()
        failed: list[BaseException] = []

        def lay() -> None:
            try:
                remap.lay_over_when_mapped(process.pid, ram, SIZE, over, watched.set)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=lay)
        thread.start()
        assert watched.wait(10)
        os.kill(process.pid, signal.SIGKILL)
        thread.join(10)
        assert [type(error) for error in failed] == [VmmDied]
