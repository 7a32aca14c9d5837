"""VMM processes: started detached, named so that a recycled pid is never taken for one, ended for certain.

A VMM outlives the process that started it, and any other host process may operate on it. So nothing here relies on being the parent:
liveness is pid + start time + executable (/proc), and the end is awaited through a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ParamSpec

from coppice.completion import complete
from coppice.errors import HostCannot, MissingTool, VmmTimeout
from coppice.model import VmmProcess

P = ParamSpec("P")
_EXIT_DEADLINE_S = 10.0
_CAP_SYS_PTRACE = 19  # linux/capability.h
_REMEMBERED = 256
_children: dict[
    tuple[int, int], subprocess.Popen[bytes]
] = {}  # kept so that their ends can be collected: a zombie keeps its pid
_ended: dict[tuple[int, int], int] = {}  # exit statuses, oldest first
_reaping = threading.Lock()
_LAUNCHERS = frozenset({"prlimit", "unshare"})  # programs that a VMM is started through, each of which becomes the next
_FEW = 32
_many = _FEW  # so many children, and those that have ended are looked for


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, the start time in clock ticks since boot; None where there is no such process, or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the command, field 2, may hold blanks and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(process: VmmProcess) -> bool:
    """Whether this very process runs.

    :raises HostCannot: it cannot be told, since the kernel does not show its program: to take it for dead would be to lose it
    """
    try:
        if start_ticks(process.pid) != process.start_ticks:
            return False
        return str(Path(f"/proc/{process.pid}/exe").readlink()).removesuffix(" (deleted)") == process.executable
    except PermissionError as error:
        raise HostCannot(
            f"the kernel does not show whether process {process.pid} is a VMM",
            hint="run as the user who started it, or as root with CAP_SYS_PTRACE",
        ) from error
    except OSError:
        return False


def may_trace_any(status: str | None = None) -> bool:
    """Whether this process has CAP_SYS_PTRACE, from its /proc/PID/status: without it not even root may look into a process that gave up root."""
    text = Path("/proc/self/status").read_text() if status is None else status
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", text, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_SYS_PTRACE & 1)


def own_process() -> tuple[int, int]:
    """Pid and start ticks of this process."""
    return os.getpid(), start_ticks(os.getpid()) or 0


def spawn(
    argv: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    pass_fds: Iterable[int] = (),
    becomes: str | None = None,
    largest_file: int | None = None,
) -> VmmProcess:
    """Start a detached process in `cwd` with stdout and stderr appended to `log`. Blocks for about a millisecond per 10 MiB of this process.

    No preexec_fn: it would turn vfork into fork, and copy the page tables of a large host process for each VMM.

    `becomes` is the program that the first one replaces itself with, where it is a launcher. No file can grow beyond `largest_file` bytes by
    the process: to write more fails (EFBIG) and does not end it.

    :raises MissingTool: there is no such program
    """
    _reap_ended()
    if largest_file is not None:
        program = shutil.which(argv[0])
        becomes = becomes or (str(Path(program).resolve()) if program else None)
        argv = [*_limited(largest_file), *argv] if program else argv
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                argv,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=tuple(pass_fds),
                restore_signals=False,  # Python ignores SIGXFSZ, and so must the process: by default it would be ended at the limit
            )
        except FileNotFoundError as error:
            raise MissingTool(
                f"the program {argv[0]} is not installed", hint="run `coppice doctor` for the cure"
            ) from error
    ticks = start_ticks(child.pid) or 0
    try:
        executable = _executable_once(child, becomes)
    except OSError:  # it has ended already
        executable, ticks = argv[0], 0
    _children[child.pid, ticks] = child
    return VmmProcess(pid=child.pid, start_ticks=ticks, executable=executable)


def _limited(largest: int) -> list[str]:
    """The launcher that limits the files of what it becomes.

    prlimit(2) from here would come too late: a VMM that has already given up root is another user's, and changing its limits takes
    CAP_SYS_RESOURCE, which root does not have in a container.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = largest if hard == resource.RLIM_INFINITY else min(largest, hard)
    return ["prlimit", f"--fsize={limit}:{limit}", "--"]


def _executable_once(child: subprocess.Popen[bytes], becomes: str | None) -> str:
    """The program that a process runs; of a launcher, once it runs what it `becomes`: until then nobody would know it for alive, nor end it."""
    link = Path(f"/proc/{child.pid}/exe")
    executable = str(link.readlink())
    end = time.monotonic() + _EXIT_DEADLINE_S
    while becomes is not None and executable != becomes and time.monotonic() < end:
        time.sleep(0.0005)  # an exec has no event
        executable = str(link.readlink())  # raises when it has ended: a zombie has no program
    return executable


async def start_in_thread(start: Callable[P, VmmProcess], *args: P.args, **kwargs: P.kwargs) -> VmmProcess:
    """Await a blocking start; if this task is cancelled meanwhile, the process is ended before the cancellation is raised."""
    starting = asyncio.ensure_future(asyncio.to_thread(start, *args, **kwargs))
    try:
        return await complete(starting)
    except asyncio.CancelledError:
        if not starting.cancelled() and starting.exception() is None:
            await complete(kill(starting.result()))
        raise


def reap(process: VmmProcess) -> int | None:
    """The exit status of a process that was started here and has ended; None otherwise. May be asked again soon after."""
    key = (process.pid, process.start_ticks)
    _reap(key)
    return _ended.get(key)


def _reap(key: tuple[int, int]) -> None:
    with _reaping:
        child = _children.get(key)
        if child is not None and child.poll() is not None:
            _ended[key] = _children.pop(key).returncode
            while len(_ended) > _REMEMBERED:
                del _ended[next(iter(_ended))]


def _reap_ended() -> None:
    """Collect the children that nobody waited for, since other processes ended them: each would keep its pid as long as this process lives.

    Not at each start, since it looks at all of them. Only a zombie is asked for its status: a wait could take a stop from under ptrace(2).
    """
    global _many
    if len(_children) >= _many:
        for key in list(_children):
            if start_ticks(key[0]) is None:
                _reap(key)
        _many = 2 * len(_children) + _FEW


async def wait_exit(process: VmmProcess) -> int | None:
    """Wait for the end of a process, by event and not by polling. Returns its exit status where it was started here."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return reap(process)
    try:
        if is_alive(process) or _is_ending(process):
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()
            loop.add_reader(pidfd, _settle, ended)
            try:
                await ended
            finally:
                loop.remove_reader(pidfd)
        return reap(process)
    finally:
        os.close(pidfd)


def _is_ending(process: VmmProcess) -> bool:
    """Whether it is between its last instruction and its end: it has no executable any more, and is not gone yet."""
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
    """End this very process with SIGKILL and wait until it is gone. Idempotent; a recycled pid is left alone.

    :raises VmmTimeout: the kernel did not end it within `deadline_s` (a process stuck in the kernel)
    """
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process.pid)
        try:
            if is_alive(process):  # checked after the pidfd is held, so the signal cannot reach another process
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
    try:
        await asyncio.wait_for(wait_exit(process), deadline_s)
    except TimeoutError as error:
        raise VmmTimeout(
            f"VMM process {process.pid} did not end after SIGKILL", hint="look for it in `ps` (state D)"
        ) from error


def by_working_directory(below: Path, executables: Iterable[str]) -> dict[Path, list[VmmProcess]]:
    """Processes that run one of `executables` (by file name), or are about to, with a working directory directly below `below`.

    A launcher that is to become one of them counts: the host that started it may have been killed meanwhile, and nothing else would find it.
    """
    found: dict[Path, list[VmmProcess]] = {}
    names = set(executables)
    parent = str(below.resolve())
    # Plain strings: this reads a link of every process of the host, and with pathlib takes three times as long.
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            directory = os.readlink(f"{entry.path}/cwd").removesuffix(" (deleted)")  # noqa: PTH115
            if directory.rpartition("/")[0] != parent:
                continue
            executable = os.readlink(f"{entry.path}/exe").removesuffix(" (deleted)")  # noqa: PTH115
        except OSError:
            continue
        ticks = start_ticks(int(entry.name))
        program = executable.rpartition("/")[2]
        if ticks is not None and (program in names or (program in _LAUNCHERS and _leads_to(entry.path, names))):
            process = VmmProcess(pid=int(entry.name), start_ticks=ticks, executable=executable)
            found.setdefault(Path(directory), []).append(process)
    return found


def _leads_to(process: str, names: set[str]) -> bool:
    """Whether the command line of a launcher names one of the programs; in the midst of its exec it has none yet, and is taken to."""
    try:
        words = Path(f"{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(words) or any(os.fsdecode(word).rpartition("/")[2] in names for word in words)
