"""Writes of another process are observed: none is missed, and the process is never harmed."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from coppice.errors import HostCannot, VmmDied
from coppice.linux import pagemap, written
from coppice.linux.maps import Vma, identify, private_parts, read_maps, read_text, spans_of
from coppice.linux.pagemap import PrivateRange
from coppice.linux.written import WriteObserver
from mapping_process import MappingProcess
from memory_helpers import die_after

PAGE = 4096
SIZE = 8 << 20


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(SIZE))
    return path


def ram_of(process: MappingProcess, path: Path) -> list[Vma]:
    return spans_of(private_parts(read_text(process.pid, "maps"), [identify(path)]), lambda part: part.offset)


def pages(ranges: list[PrivateRange]) -> list[tuple[int, int]]:
    return [(found.offset // PAGE, found.length // PAGE) for found in ranges]


def descriptors(process: MappingProcess) -> set[str]:
    return {path.name for path in Path(f"/proc/{process.pid}/fd").iterdir()}


def test_each_write_is_in_one_result(ram: Path) -> None:
    """The first result has all private pages, a later one those written since the one before."""
    with MappingProcess(ram) as process:
        process.touch()  # pages of the file are not private
        process.fill(PAGE, 2 * PAGE, 7)
        with WriteObserver(process.pid, ram_of(process, ram)) as observer:
            assert pages(observer.written()) == [(1, 2)]
            assert observer.written() == []
            process.write((2 * PAGE, b"again"), (9 * PAGE, b"first"))
            assert pages(observer.written()) == [(2, 1), (9, 1)]
            process.write((20 * PAGE, b"first"), (9 * PAGE, b"again"))
            every, changed = observer.final()
            assert pages(every) == [(1, 2), (9, 1), (20, 1)]
            assert pages(changed) == [(9, 1), (20, 1)]
            assert observer.final() == (every, changed)


def test_a_discarded_page_counts_as_changed(ram: Path) -> None:
    """To the kernel it looks like one that is swapped out, and its protection remains."""
    with MappingProcess(ram) as process:
        process.fill(0, 4 * PAGE, 7)
        with WriteObserver(process.pid, ram_of(process, ram)) as observer:
            observer.written()
            process.discard(PAGE, PAGE)
            every, changed = observer.final()
            assert pages(changed) == [(1, 1)]
            assert pages(every) == [(0, 4)]


def test_more_regions_than_one_call_returns_are_found_once(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the kernel's own buffer is full: all are protected, none is reported twice."""
    for regions in (4096, 700, 3):
        monkeypatch.setattr(pagemap, "_REGIONS", regions)
        with MappingProcess(ram) as process:
            process.write(*((page * PAGE, b"x") for page in range(0, SIZE // PAGE, 2)))
            with WriteObserver(process.pid, ram_of(process, ram)) as observer:
                assert pages(observer.written()) == [(page, 1) for page in range(0, SIZE // PAGE, 2)]
                assert observer.written() == []


def test_the_process_is_as_before(ram: Path) -> None:
    """It has no further descriptor, its code is what it was, and it goes on in its system call: for
    any number of observations.
    """
    with MappingProcess(ram) as process:
        before, code = descriptors(process), code_of(process)
        for value in range(40):
            process.fill(0, SIZE, value)
            with WriteObserver(process.pid, ram_of(process, ram)) as observer:
                observer.written()
                process.write((PAGE, b"x"))
                assert pages(observer.written()) == [(1, 1)]
        assert descriptors(process) == before
        assert code_of(process) == code


def code_of(process: MappingProcess) -> list[bytes]:
    """Return the ends of all of its code, where instructions are placed."""
    ends = [vma.end for vma in read_maps(process.pid) if vma.permissions == "r-xp" and vma.file.inode]
    with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
        return [os.pread(memory.fileno(), 1024, end - 1024) for end in ends]


def test_signal_handlers_run_meanwhile(ram: Path) -> None:
    """A handler that makes system calls of its own changes nothing."""
    with MappingProcess(ram) as process:
        process.handle_signals()
        before, going = descriptors(process), threading.Event()

        def send() -> None:
            while not going.wait(0.0002):
                os.kill(process.pid, signal.SIGUSR1)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            for _ in range(50):
                with WriteObserver(process.pid, ram_of(process, ram)) as observer:
                    observer.written()
        finally:
            going.set()
            sender.join()
        process.write((PAGE, b"x"))
        assert descriptors(process) == before


def test_a_tracer_may_be_killed_at_any_instant(ram: Path) -> None:
    """After any number of its calls the process continues, keeps no descriptor, and can be observed by
    another process.
    """
    calls, killed = 0, True
    while killed:
        calls += 1
        with MappingProcess(ram) as process:
            process.fill(0, SIZE, 7)
            before = descriptors(process)
            tracer = os.fork()
            if tracer == 0:
                die_after(calls)
                WriteObserver(process.pid, ram_of(process, ram)).written()
                os._exit(0)
            killed = os.waitpid(tracer, 0)[1] != 0
            process.fill(PAGE, PAGE, 8)
            process.churn(calls)
            process.halt()
            assert descriptors(process) == before
            with WriteObserver(process.pid, ram_of(process, ram)) as observer:
                assert pages(observer.written()) == [(0, SIZE // PAGE)]
    assert calls > 10


def test_an_observer_may_be_killed(ram: Path) -> None:
    """The kernel takes the protection away: the process writes on, and can be observed again."""
    with MappingProcess(ram) as process:
        process.fill(0, SIZE, 7)
        before = descriptors(process)
        reading, writing = os.pipe()
        observer = os.fork()
        if observer == 0:
            kept = WriteObserver(process.pid, ram_of(process, ram))
            kept.written()
            os.write(writing, b"x")
            signal.pause()
        assert os.read(reading, 1) == b"x"
        process.churn(1)
        os.kill(observer, signal.SIGKILL)
        os.waitpid(observer, 0)
        process.halt()
        process.fill(0, SIZE, 8)
        assert descriptors(process) == before
        with WriteObserver(process.pid, ram_of(process, ram)) as again:
            assert pages(again.written()) == [(0, SIZE // PAGE)]
        os.close(reading)
        os.close(writing)


def test_a_refusal_changes_nothing(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has no descriptor left to give; the kernel has no such protection; another userfaultfd has the mapping."""
    with MappingProcess(ram) as process:
        mappings, before, code = ram_of(process, ram), descriptors(process), code_of(process)
        limit = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (0, limit[1]))
        with pytest.raises(HostCannot, match=os.strerror(errno.EMFILE)):
            WriteObserver(process.pid, mappings)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limit)
        with WriteObserver(process.pid, mappings), pytest.raises(HostCannot, match=os.strerror(errno.EBUSY)):
            WriteObserver(process.pid, mappings)
        with monkeypatch.context() as patch:
            patch.setattr(written, "_WP_ASYNC", 1 << 60)
            with pytest.raises(HostCannot, match=os.strerror(errno.EINVAL)):
                WriteObserver(process.pid, mappings)
        process.write((PAGE, b"x"))
        assert (descriptors(process), code_of(process)) == (before, code)


def test_mappings_must_be_observed(ram: Path) -> None:
    """A page map of others is an error, not an empty result."""
    with MappingProcess(ram) as process:
        mappings = ram_of(process, ram)
        process.fill(0, PAGE, 7)
        for call in (pagemap.protect_written, pagemap.private_and_written):
            with pytest.raises(HostCannot):
                call(process.pid, mappings)


def test_an_ended_process_is_an_error(ram: Path) -> None:
    """It raises its own kind of error, before and while it is observed."""
    with MappingProcess(ram) as process:
        mappings = ram_of(process, ram)
        observer = WriteObserver(process.pid, mappings)
    with observer, pytest.raises(VmmDied):
        observer.written()
    with pytest.raises(VmmDied):
        WriteObserver(process.pid, mappings)


def test_descriptors_are_closed_in_programs(ram: Path) -> None:
    """A program that is started while writes are observed does not keep the protection."""
    with MappingProcess(ram) as process, WriteObserver(process.pid, ram_of(process, ram)) as observer:
        assert fcntl.fcntl(observer._descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
