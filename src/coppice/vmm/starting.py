"""Start detached processes with few rights.

A small static launcher starts the program (see `launcher/launcher.c`). This process starts the
launcher by vfork(2), so nothing copies the page tables of this process. Rights that a process gives
up before it starts a program cannot be given up here: capabilities, users and namespaces belong to
a thread, and a child that shares memory with this process must not run as another user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec

from coppice.completion import complete, ended, submit
from coppice.errors import HostCannot, MissingTool
from coppice.linux.files import os_errors
from coppice.model import Record, VmmProcess
from coppice.vmm.launcher import launcher_binary
from coppice.vmm.process import kill, remember, start_ticks

if TYPE_CHECKING:
    from coppice.vmm.driver import Launch

P = ParamSpec("P")
_REPORT_MOST: Final = 4096
_LAUNCHER_S: Final = 20.0
_DOCTOR: Final = "run `coppice doctor`, which checks what VMMs need"
_HINTS: Final = {
    "make a user namespace": "run `coppice doctor`, which says how to permit it; or run as root",
    "execute": "see the mode of the program with `ls -l`, and the kernel's messages with `dmesg`",
    "make a process": "see the limits of this user with `ulimit -a`, and the kernel's messages with `dmesg`",
}


class Rights(Record, frozen=True, kw_only=True):
    """The rights of a started process. By default it has those of this process."""

    restricted: bool = False  # it can gain no rights by starting a program, and leaves no core file
    user: int | None = None  # its user and group; needs root
    groups: tuple[int, ...] = ()  # its other groups, if it has a user
    capabilities: int | None = None  # the most capabilities that it can have, as a mask; needs root
    own_user_namespace: bool = False  # it is root of a user namespace in which only this user exists
    network_namespace: str = ""  # the path of the network namespace that it starts in
    cgroup: Path | None = None  # the control group that it starts in
    largest_file: int | None = None  # a write beyond this size in bytes fails with EFBIG
    most_files: int | None = None  # open at the same time
    # If a path is given, Landlock closes all other files to the process, if the kernel has it.
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Return the launcher's arguments, without those that are descriptors."""
        numbers = {"user": self.user, "file-size": self.largest_file, "files": self.most_files}
        return [
            *(["restricted"] if self.restricted else []),
            *(["userns"] if self.own_user_namespace else []),
            *([] if self.capabilities is None else [f"capabilities={self.capabilities:x}"]),
            *(f"{key}={value}" for key, value in numbers.items() if value is not None),
            *(f"group={group}" for group in self.groups),
            *(f"read={path}" for path in self.readable),
            *(f"write={path}" for path in self.writable),
        ]


def spawn(
    argv: Sequence[str] | Callable[[int], Sequence[str]],
    *,
    cwd: Path,
    log: Path,
    pass_fds: Iterable[int] = (),
    listen: Iterable[str] = (),
    rights: Rights | None = None,
) -> VmmProcess:
    """Start a detached process in `cwd` with stdout and stderr appended to `log`. Blocks.

    :param argv: the program and its arguments; or a function that makes them from the descriptor of the first of `listen`
    :param listen: names of unix sockets in `cwd`, which replace stale ones. The process has them open, and they listen
        before it starts
    :raises MissingTool: the program is not installed
    :raises HostCannot: the process cannot be started, or a right cannot be taken from it
    """
    rights = rights or Rights()
    kept = tuple(pass_fds)
    with contextlib.ExitStack() as stack:
        with os_errors(f"open {log}"):
            output = stack.enter_context(log.open("ab"))
        report, tell = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, report)
        words = [f"report={tell}", *(f"keep={fd}" for fd in kept), *rights.words()]
        inherited = [tell, *kept]
        try:
            for word, path, name in (
                ("netns", rights.network_namespace, "network namespace"),
                ("cgroup", rights.cgroup, "control group"),
            ):
                if path:
                    inherited.append(_opened(stack, path, f"enter the {name} of a VMM"))
                    words.append(f"{word}={inherited[-1]}")
            first = max(inherited) + 1
            words += [f"listen-from={first}", *(f"listen={name}" for name in listen)]
            if callable(argv):
                argv = argv(first)
            program = _found(argv[0])
            launcher = _start_launcher(
                [launcher_binary(), *words, "--", program, *argv[1:]], cwd, output.fileno(), inherited
            )
        finally:
            os.close(tell)
        said = b""
        while more := os.read(report, _REPORT_MOST):
            said += more
        launcher.wait()
    return _started(said.decode(), argv[0], cwd)


def _found(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        raise MissingTool(
            f"the program {name} is not installed", hint="run `coppice doctor`, which says how to install it"
        )
    return program


def _opened(stack: contextlib.ExitStack, path: str | Path, what: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostCannot(f"Cannot {what}, {path}: {error.strerror}", hint=_DOCTOR) from error
    stack.callback(os.close, descriptor)
    return descriptor


def _start_launcher(argv: list[str], cwd: Path, output: int, inherited: list[int]) -> subprocess.Popen[bytes]:
    # No preexec_fn, user or group: each of them would turn vfork into fork.
    try:
        return subprocess.Popen(
            argv,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            restore_signals=False,  # the launcher sets them
        )
    except OSError as error:
        raise HostCannot(f"Cannot start the VMM launcher in {cwd}: {error.strerror or error}", hint=_DOCTOR) from error


def _started(said: str, program: str, cwd: Path) -> VmmProcess:
    """Return the process that the launcher's report names.

    :raises HostCannot: the report has a failure; the process has then ended, and is reaped
    """
    lines = dict(line.split(" ", 1) for line in said.splitlines())
    pid = int(lines.get("started", 0))
    if "failed" in lines or not pid:
        if pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        code, _, step = lines.get("failed", f"{errno.EIO} run the launcher").partition(" ")
        raise HostCannot(
            f"Cannot start {program} in {cwd}: cannot {step}: {os.strerror(int(code))}", hint=_HINTS.get(step, _DOCTOR)
        )
    ticks = start_ticks(pid) or 0
    try:
        executable = os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - a fork does this
    except OSError:  # it has ended already: a zombie has no program
        executable, ticks = program, 0
    process = VmmProcess(pid=pid, start_ticks=ticks, executable=executable)
    remember(process)
    return process


async def start_in_thread(
    launch: Launch, start: Callable[Concatenate[Launch, P], VmmProcess], *args: P.args, **kwargs: P.kwargs
) -> VmmProcess:
    """Run a blocking start in a thread, and record its process there. End the process if it cannot be
    recorded, or if this task is cancelled.
    """
    started: list[VmmProcess] = []

    def work() -> VmmProcess:
        started.append(start(launch, *args, **kwargs))
        if started[0].start_ticks:  # else it has ended already
            launch.record(started[0])
        return started[0]

    try:
        return await ended(submit(work))
    except BaseException:
        for process in started:
            await complete(kill(process))
        raise


def landlock_version() -> int:
    """Return the version of this kernel's Landlock; 0 if it has none. Blocks."""
    done = subprocess.run([launcher_binary(), "landlock"], capture_output=True, timeout=_LAUNCHER_S, check=False)
    return int(done.stdout or b"0")
