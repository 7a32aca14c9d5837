"""Identify, await and end VMM processes.

A VMM outlives the process that started it, and any other host process may operate on it. So nothing
here requires being the parent: liveness is pid + start time + executable (from /proc), and a pidfd
signals the end. A recycled pid is never mistaken for a VMM.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from coppice.errors import HostCannot, VmmTimeout
from coppice.model import VmmProcess
from coppice.vmm.launcher import PROGRAM as LAUNCHER

_EXIT_DEADLINE_S = 10.0
_LOG_TAIL = 16 << 10
_CAP_SYS_PTRACE = 19  # linux/capability.h
_REMEMBERED = 256
# Children by pid and start ticks, kept until they are reaped: a zombie keeps its pid.
_children: set[tuple[int, int]] = set()
_ended: dict[tuple[int, int], int] = {}  # exit statuses, oldest first
_reaping = threading.Lock()
_FEW = 32
_many = _FEW  # the number of children from which ended ones are looked for


def start_ticks(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None if it is gone or a zombie."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)  # a file object makes six more calls
        try:
            text = os.read(descriptor, 4096)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(b")")[2].split()  # field 2, the command, may contain blanks and parentheses
    return None if fields[0] in b"ZX" else int(fields[19])


def is_alive(process: VmmProcess) -> bool:
    """Return whether exactly this process runs.

    :raises HostCannot: the kernel hides the process's executable from this user
    """
    try:
        if start_ticks(process.pid) != process.start_ticks:
            return False
        return os.readlink(f"/proc/{process.pid}/exe").removesuffix(" (deleted)") == process.executable  # noqa: PTH115
    except PermissionError as error:
        raise HostCannot(
            f"the kernel does not show whether process {process.pid} is a VMM",
            hint="run as the user who started it, or as root with CAP_SYS_PTRACE",
        ) from error
    except OSError:
        return False


def may_trace_any(status: str | None = None) -> bool:
    """Return whether this process has CAP_SYS_PTRACE.

    Without it, not even root may inspect a process that dropped root.

    :param status: the text of /proc/PID/status, by default this process's
    """
    text = Path("/proc/self/status").read_text() if status is None else status
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", text, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_SYS_PTRACE & 1)


def own_process() -> tuple[int, int]:
    """Return pid and start ticks of this process."""
    return os.getpid(), start_ticks(os.getpid()) or 0


def remember(process: VmmProcess) -> None:
    """Reap this child when it has ended. Until then it may become a zombie, which keeps its pid."""
    _reap_ended()
    _children.add((process.pid, process.start_ticks))


def reap(process: VmmProcess) -> int | None:
    """Return the exit status of a child that ended recently; None otherwise."""
    key = (process.pid, process.start_ticks)
    _reap(key)
    return _ended.get(key)


def _reap(key: tuple[int, int]) -> None:
    with _reaping:
        if key not in _children:
            return
        try:
            pid, status = os.waitpid(key[0], os.WNOHANG)
        except ChildProcessError:  # another part of this program has reaped it, or ignores SIGCHLD
            _children.discard(key)
            return
        if pid:
            _children.discard(key)
            _ended[key] = os.waitstatus_to_exitcode(status)
            while len(_ended) > _REMEMBERED:
                del _ended[next(iter(_ended))]


def _reap_ended() -> None:
    """Reap children that other processes ended: each zombie keeps its pid as long as this process
    lives.

    Done only now and then, since it looks at all children. Only zombies are waited for: waiting for
    any other child could take a stop away from ptrace(2).
    """
    global _many
    if len(_children) >= _many:
        for key in list(_children):
            if start_ticks(key[0]) is None:
                _reap(key)
        _many = 2 * len(_children) + _FEW


async def wait_exit(process: VmmProcess) -> int | None:
    """Wait for the end of a process without polling; return the exit status if it is a child."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return reap(process)
    try:
        if is_alive(process) or _is_ending(process):
            await _end_of(pidfd)
        return reap(process)
    finally:
        os.close(pidfd)


async def _end_of(pidfd: int) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pidfd, _settle, ended)
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)


def _is_ending(process: VmmProcess) -> bool:
    """Return whether a process is ending: it still exists but has no executable any more."""
    if (process.pid, process.start_ticks) not in _children and start_ticks(process.pid) != process.start_ticks:
        return False
    try:
        Path(f"/proc/{process.pid}/exe").readlink()
    except OSError:
        return True
    return False


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def kill(process: VmmProcess, *, deadline_s: float = _EXIT_DEADLINE_S) -> None:
    """End exactly this process with SIGKILL and wait until it is gone. Idempotent; a recycled pid
    is left alone.

    :raises VmmTimeout: the process did not end within `deadline_s`, since it is stuck in the kernel
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        reap(process)
        return
    try:
        if is_alive(process):  # checked after opening the pidfd, so the signal cannot reach another process
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        elif not _is_ending(process):
            return
        async with asyncio.timeout(deadline_s):
            await _end_of(pidfd)
    except TimeoutError as error:
        reap(process)
        if not is_alive(process) and not _is_ending(process):
            return  # it ended in time, and a busy event loop noticed late
        raise VmmTimeout(
            f"VMM process {process.pid} did not end within {deadline_s:g} s after SIGKILL",
            hint=f"run `ps -o pid,state,wchan {process.pid}`: state D is a process stuck in the kernel",
        ) from error
    finally:
        os.close(pidfd)
        reap(process)


def exit_reason(log: Path, status: int | None, said_in: Callable[[str], str]) -> str:
    """Return why a VMM ended, one line. `said_in` finds its last words in the end of its log. Blocks."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LOG_TAIL))
            text = stream.read().decode(errors="replace")
    except OSError:
        text = ""
    said = said_in(text)
    if status is not None and status < 0:
        return f"signal {-status}" + (f", last words: {said}" if said else "")
    return said or ("exit status unknown" if status is None else f"exit status {status}")


def by_working_directory(below: Path, executables: Iterable[str]) -> dict[Path, list[VmmProcess]]:
    """Return the processes that run one of `executables` (file names) in a directory directly below
    `below`.

    Includes launchers that are about to run one, and children of a host process that have not run
    their program yet: if that host process was killed, nothing else finds them. Also includes
    ending processes, whose program the kernel does not tell any more: `kill` waits for their end.
    """
    found: dict[Path, list[VmmProcess]] = {}
    names = set(executables)
    parent = str(below.resolve())
    # Plain strings, since this reads links of every process of the host: pathlib takes three times
    # as long.
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            directory = os.readlink(f"{entry.path}/cwd").removesuffix(" (deleted)")  # noqa: PTH115
            if directory.rpartition("/")[0] != parent:
                continue
            executable = _program(entry.path)
        except OSError:
            continue
        ticks = start_ticks(int(entry.name))
        program = executable.rpartition("/")[2]
        wanted = (
            not program
            or program in names
            or (program == LAUNCHER and _leads_to(entry.path, names))
            or _logs_into(entry.path, directory)
        )
        if ticks is not None and wanted:
            process = VmmProcess(pid=int(entry.name), start_ticks=ticks, executable=executable)
            found.setdefault(Path(directory), []).append(process)
    return found


def _program(process: str) -> str:
    """Return the program that a process runs; "" if it has freed its memory and is ending."""
    try:
        return os.readlink(f"{process}/exe").removesuffix(" (deleted)")  # noqa: PTH115
    except FileNotFoundError:
        return ""


def _logs_into(process: str, directory: str) -> bool:
    """Return whether a process's output goes to a file in the directory, as `spawn` connects it.

    A child has this output before it runs its program. It closes the locks of the host process
    before that too, so the locks do not tell that it is starting.
    """
    try:
        return os.readlink(f"{process}/fd/1").rpartition("/")[0] == directory  # noqa: PTH115
    except OSError:
        return False


def _leads_to(process: str, names: set[str]) -> bool:
    """Return whether a launcher's command line names one of the programs.

    During an exec the command line is empty, which counts as a match.
    """
    try:
        words = Path(f"{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(words) or any(os.fsdecode(word).rpartition("/")[2] in names for word in words)
