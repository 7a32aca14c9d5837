"""VMM processes are identified beyond doubt and ended reliably, and no other process is ever
touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from coppice.errors import HostCannot, NotFound
from coppice.model import MIB, MachineSpec, Manifest, VmmProcess
from coppice.vmm import process as process_control
from coppice.vmm import sockets
from coppice.vmm.driver import Launch, unrecorded
from coppice.vmm.launcher import PROGRAM as LAUNCHER
from coppice.vmm.process import (
    by_working_directory,
    is_alive,
    kill,
    may_trace_any,
    own_process,
    reap,
    start_ticks,
    wait_exit,
)
from coppice.vmm.starting import spawn, start_in_thread


def sleeper(tmp_path: Path) -> VmmProcess:
    """Start a process that does nothing."""
    return spawn(["sleep", "1000"], cwd=tmp_path, log=tmp_path / "log")


async def test_a_process_lives_until_it_is_killed(tmp_path: Path) -> None:
    """A kill returns after the process has ended, can be repeated, and leaves no zombie."""
    process = sleeper(tmp_path)
    assert is_alive(process)
    assert Path(process.executable).name in ("sleep", "coreutils", "busybox")
    for _ in range(2):
        await kill(process)
        assert not is_alive(process)
        assert not Path(f"/proc/{process.pid}").exists()


async def test_a_process_is_detached_and_inherits_only_the_given_files(tmp_path: Path, fake_vmm: Path) -> None:
    """The process leads its own session, so no terminal signal reaches it, and it holds no file of
    the host.
    """
    ready, tell = os.pipe()
    os.set_inheritable(ready, True)
    (tmp_path / "ram").write_bytes(bytes(4096))
    argv = [str(fake_vmm), "private", "ram", "4096", str(tell), "saved"]
    process = spawn(argv, cwd=tmp_path, log=tmp_path / "log", pass_fds=[tell])
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"\0"
        assert os.read(ready, 1) == b""  # the parent has closed its copy
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
    """A process with the same pid but another start time or program does not count as alive; kill
    and wait leave it alone.
    """
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


def test_an_unreadable_process_is_not_taken_for_dead() -> None:
    """In a container root may not read the program of an ordinary user's process: taking it for
    dead would lose a running VMM.
    """
    init = VmmProcess(pid=1, start_ticks=start_ticks(1) or 0, executable=str(Path("/sbin/init").resolve()))
    with as_unprivileged(), pytest.raises(HostCannot, match="does not show"):
        is_alive(init)
    with as_unprivileged():
        assert not is_alive(msgspec.structs.replace(init, start_ticks=init.start_ticks + 1))


def test_a_hidden_process_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """If /proc is mounted with hidepid=1, even the start time is hidden."""

    def hidden(pid: int) -> int | None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), f"/proc/{pid}/stat")

    monkeypatch.setattr(process_control, "start_ticks", hidden)
    with pytest.raises(HostCannot, match="does not show"):
        is_alive(VmmProcess(pid=1, start_ticks=1, executable="/sbin/init"))


def test_the_ptrace_capability_is_read_from_the_status() -> None:
    """CAP_SYS_PTRACE is bit 19 of the effective set, whatever the other bits are."""
    assert may_trace_any("CapPrm:\t00000000a80c25fb\nCapEff:\t0000000000080000\n")
    assert not may_trace_any("CapPrm:\t00000000a80c25fb\nCapEff:\t00000000a80425fb\n")
    with as_unprivileged():
        assert not may_trace_any()


@contextlib.contextmanager
def as_unprivileged() -> Iterator[None]:
    """Drop root's privileges for the length of a block, if this process has them."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


async def test_the_end_of_a_process_has_a_status(tmp_path: Path) -> None:
    """The result is the exit status, or the negated signal, of a process that was started here; it
    is None for any other.
    """
    process = spawn(["sh", "-c", "exit 7"], cwd=tmp_path, log=tmp_path / "log")
    assert await wait_exit(process) == 7
    assert await wait_exit(process) == 7  # remembered for a later caller
    process = sleeper(tmp_path)
    waiting = asyncio.create_task(wait_exit(process))
    await asyncio.sleep(0)
    assert not waiting.done()
    os.kill(process.pid, signal.SIGTERM)
    assert await asyncio.wait_for(waiting, 5) == -signal.SIGTERM
    assert reap(process) == -signal.SIGTERM


async def test_a_process_that_ended_in_time_is_no_late_one(tmp_path: Path) -> None:
    """A busy event loop can notice the end only after the deadline. The process counts, not the loop."""
    process = sleeper(tmp_path)
    with contextlib.closing(select.epoll()) as ended:
        pidfd = os.pidfd_open(process.pid)
        ended.register(pidfd, select.EPOLLIN)
        os.kill(process.pid, signal.SIGKILL)
        assert ended.poll(10)
        os.close(pidfd)
    await kill(process, deadline_s=0)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


async def test_the_end_of_another_parents_process_is_awaited(tmp_path: Path) -> None:
    """A VMM outlives the host process that started it, and another host process ends it."""
    foreign = await asyncio.to_thread(subprocess.Popen, ["sleep", "1000"], cwd=tmp_path)
    ticks = start_ticks(foreign.pid)
    assert ticks is not None
    executable = str(Path(f"/proc/{foreign.pid}/exe").readlink())
    process = VmmProcess(pid=foreign.pid, start_ticks=ticks, executable=executable)
    assert is_alive(process)
    await kill(process)
    assert not is_alive(process)
    assert foreign.wait(5) == -signal.SIGKILL


async def test_children_ended_by_others_are_reaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may end the VMMs that this one started: they are reaped when the next ones
    are started.
    """
    monkeypatch.setattr(process_control, "_children", set())
    monkeypatch.setattr(process_control, "_many", process_control._FEW)
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
    """A zombie has a pid and a start time, but never runs again."""
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{dead.pid}").exists()
    assert start_ticks(dead.pid) is None
    dead.wait()
    assert start_ticks(dead.pid) is None


def test_odd_program_names_in_proc_are_parsed(tmp_path: Path) -> None:
    """The second field of /proc/PID/stat is the program's name, which may contain blanks and
    parentheses.
    """
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


async def test_a_process_may_end_at_once(tmp_path: Path) -> None:
    """The start does not fail; the exit status and the log can be read."""
    for _ in range(20):
        process = spawn(["sh", "-c", "echo gone >&2"], cwd=tmp_path, log=tmp_path / "log")
        assert await wait_exit(process) == 0
        assert not is_alive(process)
    assert (tmp_path / "log").read_text() == "gone\n" * 20


def test_own_process_is_this_process() -> None:
    """The journal records this process as the owner of its operations."""
    pid, ticks = own_process()
    assert (pid, ticks) == (os.getpid(), start_ticks(os.getpid()))


async def test_processes_are_found_by_their_working_directory(tmp_path: Path) -> None:
    """Only processes of that program, directly below the directory, are found, even if their
    directory has been removed.
    """
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


def test_a_child_is_found_before_it_runs_its_program(tmp_path: Path) -> None:
    """A child of a killed host process still has that process's program, and no lock any more. Its
    output goes to the log of the instance. Another program in the directory is left alone.
    """
    (directory := tmp_path / "instances" / "a").mkdir(parents=True)
    (tmp_path / "instances" / "b").mkdir()
    with (directory / "vmm.log").open("wb") as log:
        child = subprocess.Popen(["sleep", "1000"], cwd=directory, stdout=log)
        other = subprocess.Popen(["sleep", "1000"], cwd=directory, stdout=subprocess.DEVNULL)
        elsewhere = subprocess.Popen(["sleep", "1000"], cwd=tmp_path / "instances" / "b", stdout=log)
    with child, other, elsewhere:
        try:
            found = by_working_directory(tmp_path / "instances", ["some-vmm"])
            assert {path: [each.pid for each in processes] for path, processes in found.items()} == {
                directory: [child.pid]
            }
        finally:
            for process in (child, other, elsewhere):
                process.kill()


async def test_the_end_of_an_ending_process_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between freeing its memory and leaving its directory a process has no program any more. It is
    found by its directory, and `kill` returns only when it is gone.
    """
    (directory := tmp_path / "instances" / "a").mkdir(parents=True)
    process = spawn(["sleep", "1000"], cwd=directory, log=tmp_path / "log")
    readlink = os.readlink

    def read(path: str | Path, **options: int) -> str:
        if str(path) == f"/proc/{process.pid}/exe":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return readlink(path, **options)

    monkeypatch.setattr(os, "readlink", read)
    ((found,),) = (await asyncio.to_thread(by_working_directory, directory.parent, ["some-vmm"])).values()
    assert (found.pid, found.start_ticks) == (process.pid, process.start_ticks)
    ending = asyncio.create_task(kill(found))
    assert not (await asyncio.wait([ending], timeout=0.2))[0]
    os.kill(process.pid, signal.SIGKILL)
    await ending
    assert start_ticks(process.pid) is None


@pytest.mark.parametrize(
    ("argv", "found"),
    [([LAUNCHER, "--", "/usr/bin/some-vmm"], True), ([LAUNCHER, "--", "other"], False), ([""], True)],
    ids=["becomes a VMM", "becomes something else", "during its exec"],
)
def test_a_launcher_is_found_by_its_target_program(tmp_path: Path, argv: list[str], found: bool) -> None:
    """The kernel sets the new program slightly before the new command line: in between, the command
    line is empty.
    """
    (tmp_path / "instances" / "a").mkdir(parents=True)
    launcher = tmp_path / LAUNCHER
    shutil.copy(shutil.which("cat") or "/bin/cat", launcher)
    # cat waits for its stdin, whatever follows
    launcher_argv = [argv[0], "-", *argv[2:]] if argv[1:] else argv
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


def test_a_process_starts_with_sockets_that_listen(tmp_path: Path) -> None:
    """They can be connected to as soon as it runs, and stale ones are replaced. No descriptor is taken twice."""
    names = ["one.sock", "two.sock"]
    (tmp_path / names[0]).write_text("stale")
    numbers: list[int] = []

    def argv(first: int) -> list[str]:
        numbers.extend((first, first + 1))
        return ["sleep", "60"]

    with (tmp_path / "kept").open("w") as kept:
        inherited = kept.fileno()
        process = spawn(argv, cwd=tmp_path, log=tmp_path / "log", pass_fds=[inherited], listen=names)
    try:
        opened = {path.name: str(path.readlink()) for path in Path(f"/proc/{process.pid}/fd").iterdir()}
        assert opened.keys() == {"0", "1", "2", str(inherited), *map(str, numbers)}
        assert opened[str(inherited)] == str(tmp_path / "kept")
        assert all(opened[str(number)].startswith("socket:") for number in numbers)
        for name in names:
            sockets.connect(tmp_path, name).close()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)


def launch_in(directory: Path, record: Callable[[VmmProcess], None] = unrecorded) -> Launch:
    machine = MachineSpec(memory_bytes=MIB, cpus=1, kernel="k", network="none")
    manifest = Manifest(
        driver="sleeper",
        vmm_version="1",
        machine="m",
        accel="none",
        cpu_model="none",
        cpu_flags="",
        kernel="k",
        memory_bytes=MIB,
        cpus=1,
    )
    return Launch(directory=directory, machine=machine, disks=(), manifest=manifest, record=record)


async def test_a_process_that_cannot_be_recorded_is_ended(tmp_path: Path) -> None:
    """A removed machine has no process."""
    recorded: list[VmmProcess] = []

    def record(process: VmmProcess) -> None:
        assert is_alive(process)
        recorded.append(process)
        raise NotFound("the machine is gone", hint="see `coppice ls`")

    with pytest.raises(NotFound):
        await start_in_thread(launch_in(tmp_path, record), lambda launch: sleeper(launch.directory))
    assert not is_alive(recorded[0])


async def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    """A start runs in a thread that cannot be cancelled: its process is ended before the
    cancellation is raised.
    """
    started: list[VmmProcess] = []
    loop = asyncio.get_running_loop()

    def start(_: Launch) -> VmmProcess:
        loop.call_soon_threadsafe(task.cancel)
        started.append(sleeper(tmp_path))
        return started[0]

    task = asyncio.create_task(start_in_thread(launch_in(tmp_path), start))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(started[0])
    assert reap(started[0]) == -signal.SIGKILL
