"""VMM processes: named beyond doubt, ended for certain, and no other process ever touched."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import resource
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coppice.errors import HostCannot, MissingTool
from coppice.model import VmmProcess
from coppice.vmm import process as process_control
from coppice.vmm.process import (
    by_working_directory,
    is_alive,
    kill,
    may_trace_any,
    own_process,
    reap,
    spawn,
    start_in_thread,
    start_ticks,
    wait_exit,
)


def sleeper(tmp_path: Path) -> VmmProcess:
    """A process that does nothing."""
    return spawn(["sleep", "1000"], cwd=tmp_path, log=tmp_path / "log")


async def test_a_process_lives_until_it_is_killed(tmp_path: Path) -> None:
    """Killing returns when it is gone, again and again; no zombie is left."""
    process = sleeper(tmp_path)
    assert is_alive(process)
    assert Path(process.executable).name in ("sleep", "coreutils", "busybox")
    for _ in range(2):
        await kill(process)
        assert not is_alive(process)
        assert not Path(f"/proc/{process.pid}").exists()


async def test_it_is_detached_and_inherits_only_what_it_is_given(tmp_path: Path, fake_vmm: Path) -> None:
    """It leads a session of its own, so no signal of a terminal reaches it, and holds no file of the host."""
    ready, tell = os.pipe()
    os.set_inheritable(ready, True)
    (tmp_path / "ram").write_bytes(bytes(4096))
    argv = [str(fake_vmm), "private", "ram", "4096", str(tell)]
    process = spawn(argv, cwd=tmp_path, log=tmp_path / "log", pass_fds=[tell])
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"\0"
        assert os.read(ready, 1) == b""  # it has closed what it was given
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert int(fields[3]) == process.pid  # session
        held = {entry.readlink().name for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
        assert held == {"null", "log", "ram"}
        assert Path(f"/proc/{process.pid}/cwd").readlink() == tmp_path
    finally:
        await kill(process)
        os.close(ready)


@pytest.mark.parametrize(
    "change",
    [{"start_ticks": 1}, {"executable": "/usr/bin/other"}],
    ids=["other start time", "other program"],
)
async def test_a_recycled_pid_is_another_process(tmp_path: Path, change: dict[str, object]) -> None:
    """The same pid with another start time or program is not alive, and is left alone by kill and wait."""
    process = sleeper(tmp_path)
    try:
        impostor = msgspec.structs.replace(process, **change)
        assert not is_alive(impostor)
        await kill(impostor)
        async with asyncio.timeout(5):
            await wait_exit(impostor)
        assert is_alive(process)
    finally:
        await kill(process)


def test_a_process_that_may_not_be_looked_at_is_not_taken_for_dead() -> None:
    """Root of a container, as an ordinary user, is not shown another user's program: to call that dead would lose a VMM that runs."""
    init = VmmProcess(pid=1, start_ticks=start_ticks(1) or 0, executable=str(Path("/sbin/init").resolve()))
    with as_nobody(), pytest.raises(HostCannot, match="does not show"):
        is_alive(init)
    with as_nobody():
        assert not is_alive(msgspec.structs.replace(init, start_ticks=init.start_ticks + 1))


def test_a_process_that_is_hidden_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """With /proc mounted hidepid=1 not even its start time is shown."""

    def hidden(pid: int) -> int | None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), f"/proc/{pid}/stat")

    monkeypatch.setattr(process_control, "start_ticks", hidden)
    with pytest.raises(HostCannot, match="does not show"):
        is_alive(VmmProcess(pid=1, start_ticks=1, executable="/sbin/init"))


def test_whether_others_may_be_looked_at() -> None:
    """CAP_SYS_PTRACE is bit 19 of the effective set, whatever else is in it."""
    assert may_trace_any("CapPrm:\t00000000a80c25fb\nCapEff:\t0000000000080000\n")
    assert not may_trace_any("CapPrm:\t00000000a80c25fb\nCapEff:\t00000000a80425fb\n")
    with as_nobody():
        assert not may_trace_any()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """For the length of a block without root's powers, where we have them."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


async def test_the_end_is_an_event_with_a_status(tmp_path: Path) -> None:
    """The exit status, or the negated signal, of a process that was started here; None for any other."""
    process = spawn(["sh", "-c", "exit 7"], cwd=tmp_path, log=tmp_path / "log")
    assert await wait_exit(process) == 7
    assert await wait_exit(process) == 7  # remembered for whoever asks next
    process = sleeper(tmp_path)
    waiting = asyncio.create_task(wait_exit(process))
    await asyncio.sleep(0)
    assert not waiting.done()
    os.kill(process.pid, signal.SIGTERM)
    assert await asyncio.wait_for(waiting, 5) == -signal.SIGTERM
    assert reap(process) == -signal.SIGTERM


async def test_a_process_of_another_parent_is_awaited_too(tmp_path: Path) -> None:
    """A VMM outlives the host process that started it, and another one ends it."""
    foreign = await asyncio.to_thread(subprocess.Popen, ["sleep", "1000"], cwd=tmp_path)
    ticks = start_ticks(foreign.pid)
    assert ticks is not None
    executable = str(Path(f"/proc/{foreign.pid}/exe").readlink())
    process = VmmProcess(pid=foreign.pid, start_ticks=ticks, executable=executable)
    assert is_alive(process)
    await kill(process)
    assert not is_alive(process)
    assert foreign.wait(5) == -signal.SIGKILL


async def test_children_that_others_ended_do_not_stay_for_ever(tmp_path: Path) -> None:
    """Another process may end the VMMs that this one started: their pids are free again when more are started."""
    pids = []
    for _ in range(150):
        process = sleeper(tmp_path)
        pidfd = os.pidfd_open(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert (await asyncio.to_thread(select.select, [pidfd], [], [], 10))[0]
        os.close(pidfd)
        pids.append(process.pid)
    zombies = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(zombies) <= 64
    assert reap(process) == -signal.SIGKILL


def test_a_zombie_is_not_alive() -> None:
    """It has a pid and a start time, and will never do anything again."""
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{dead.pid}").exists()
    assert start_ticks(dead.pid) is None
    dead.wait()
    assert start_ticks(dead.pid) is None


def test_names_in_proc_do_not_confuse_it(tmp_path: Path) -> None:
    """The second field of /proc/PID/stat is the guest's to choose, in a way: it may hold blanks and parentheses."""
    program = tmp_path / "a) R 1 (b"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    with subprocess.Popen([program, "1000"]) as odd:
        try:
            mine = start_ticks(os.getpid())
            ticks = start_ticks(odd.pid)
            assert ticks is not None
            assert mine is not None
            assert ticks >= mine
        finally:
            odd.kill()


async def test_no_file_grows_beyond_its_limit(tmp_path: Path) -> None:
    """A guest writes to its console as it likes: the log has an end, and the VMM lives on there."""
    go, tell = os.pipe()
    script = f"read word </proc/self/fd/{go}; head -c 3000000 /dev/zero; exec sleep 1000"
    process = spawn(["sh", "-c", script], cwd=tmp_path, log=tmp_path / "log", pass_fds=[go], largest_file=1 << 20)
    os.close(go)
    os.write(tell, b"now\n")
    os.close(tell)
    async with asyncio.timeout(10):
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":  # noqa: ASYNC110 - an exec has no event
            await asyncio.sleep(0.01)
    assert (tmp_path / "log").stat().st_size == 1 << 20
    await kill(msgspec.structs.replace(process, executable=str(Path(f"/proc/{process.pid}/exe").readlink())))


async def test_the_limit_does_not_depend_on_when_the_process_gives_up_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container root may not change the limits of another user's process, which a VMM is soon after its start: it has them from the start."""

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "prlimit", refused)
    process = spawn(["sleep", "1000"], cwd=tmp_path, log=tmp_path / "log", largest_file=1 << 20)
    try:
        assert process.executable == os.path.realpath(shutil.which("sleep") or "")
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"Max file size +1048576 +1048576 ", limits)
    finally:
        await kill(process)


async def test_a_launcher_is_known_by_what_it_becomes(tmp_path: Path) -> None:
    """Before that it would be taken for dead: a wait for its end would return at once, and a kill would leave it."""
    program = os.path.realpath(shutil.which("sleep") or "")
    slow = ["sh", "-c", f"i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec {program} 1000"]
    process = spawn(slow, cwd=tmp_path, log=tmp_path / "log", becomes=program)
    assert is_alive(process)
    await kill(process)
    assert not Path(f"/proc/{process.pid}").exists()


async def test_a_launcher_that_fails_is_a_process_that_ended(tmp_path: Path) -> None:
    """It never becomes anything: that is no reason to wait for it."""
    async with asyncio.timeout(5):
        process = await asyncio.to_thread(
            spawn, ["sh", "-c", "exit 3"], cwd=tmp_path, log=tmp_path / "log", becomes="/usr/bin/sleep"
        )
        assert not process.start_ticks
        assert await wait_exit(process) == 3


def test_a_missing_program_is_said_so(tmp_path: Path) -> None:
    """With the way to its cure."""
    with pytest.raises(MissingTool, match="no-such-vmm") as refusal:
        spawn(["no-such-vmm"], cwd=tmp_path, log=tmp_path / "log")
    assert "doctor" in str(refusal.value)


async def test_a_process_that_ends_at_once_is_a_process_that_ended(tmp_path: Path) -> None:
    """Starting it does not fail; its end and its words are there to be read."""
    for _ in range(20):
        process = spawn(["sh", "-c", "echo gone >&2"], cwd=tmp_path, log=tmp_path / "log")
        assert await wait_exit(process) == 0
        assert not is_alive(process)
    assert (tmp_path / "log").read_text() == "gone\n" * 20


def test_the_own_process_is_this_one() -> None:
    """What the journal calls its owner."""
    pid, ticks = own_process()
    assert (pid, ticks) == (os.getpid(), start_ticks(os.getpid()))


async def test_processes_are_found_by_where_they_work(tmp_path: Path) -> None:
    """Directly below the directory and of that program only, even when the directory has been removed."""
    instances = tmp_path / "instances"
    for name in ("a", "a/deeper", "b"):
        (instances / name).mkdir(parents=True)
    log = tmp_path / "log"
    found_in_a = [spawn(["sleep", "1000"], cwd=instances / "a", log=log) for _ in range(2)]
    in_b = spawn(["sleep", "1000"], cwd=instances / "b", log=log)
    others = [
        spawn(["sleep", "1000"], cwd=instances / "a" / "deeper", log=log),
        spawn(["tail", "-f", "/dev/null"], cwd=instances / "a", log=log),
        spawn(["sleep", "1000"], cwd=instances, log=log),
    ]
    try:
        shutil.rmtree(instances / "b")
        name = Path(in_b.executable).name
        found = await asyncio.to_thread(by_working_directory, instances, [name])
        assert set(found) == {instances / "a", instances / "b"}
        assert sorted(process.pid for process in found[instances / "a"]) == sorted(p.pid for p in found_in_a)
        assert found[instances / "b"] == [in_b]
    finally:
        for process in (*found_in_a, in_b, *others):
            await kill(process)


@pytest.mark.parametrize(
    ("argv", "found"),
    [(["prlimit", "--", "/usr/bin/some-vmm"], True), (["prlimit", "--", "other"], False), ([""], True)],
    ids=["becomes a VMM", "becomes something else", "in the midst of its exec"],
)
def test_a_launcher_is_found_by_what_it_is_to_become(tmp_path: Path, argv: list[str], found: bool) -> None:
    """The kernel gives a process its new program first and its new command line a moment later: in between there is none to go by."""
    (tmp_path / "instances" / "a").mkdir(parents=True)
    launcher = tmp_path / "prlimit"
    shutil.copy(shutil.which("cat") or "/bin/cat", launcher)
    launcher_argv = [argv[0], "-", *argv[2:]] if argv[1:] else argv  # cat waits for its stdin, whatever comes after
    with subprocess.Popen(
        launcher_argv, executable=launcher, cwd=tmp_path / "instances" / "a", stdin=subprocess.PIPE
    ) as process:
        try:
            while argv[1:] and not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                pass  # an exec has no event
            processes = by_working_directory(tmp_path / "instances", ["some-vmm"])
            assert [each.pid for each in processes.get(tmp_path / "instances" / "a", [])] == [process.pid] * found
        finally:
            process.kill()


async def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    """A start is a thread that cannot be cancelled: what it has started is ended before the cancellation is raised."""
    started: list[VmmProcess] = []
    loop = asyncio.get_running_loop()

    def start() -> VmmProcess:
        loop.call_soon_threadsafe(task.cancel)
        started.append(sleeper(tmp_path))
        return started[0]

    task = asyncio.create_task(start_in_thread(start))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(started[0])
    assert reap(started[0]) == -signal.SIGKILL
