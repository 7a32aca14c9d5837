"""Run an external program to its end. Every tool is run this way.

A tool has a deadline and its own process group. When its caller is cancelled, or the wait ends for
any other reason, the whole group is killed, and the call returns only after the tool is gone. A tool
ends with this process too, also if this process is killed. Blocks.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from coppice import stopping
from coppice.errors import HostCannot, MissingTool

_POLL_S = 0.1
_CHUNK = 64 << 10
_LINES_KEPT = 200
_LAUNCHERS = ("setpriv", "sh", "prlimit")
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # any other signal comes from the program itself
_UNLESS_ORPHANED = 'test "$PPID" = "$0" && exec "$@"'


class NotFinished(HostCannot):
    """A tool exceeded its deadline or was killed: its outcome is unknown."""


class Ran(NamedTuple):
    """The exit status of a tool and the last lines of its output."""

    status: int
    lines: tuple[str, ...]

    def failure(self) -> str:
        """Return why the tool failed: the last lines that apt's programs mark with `E:`, else the
        last lines.
        """
        marked = [line.removeprefix("E:").strip() for line in self.lines if line.startswith("E:")]
        return " / ".join((marked or [line for line in self.lines if line.strip()])[-4:]) or "no output"


def ends_with_us(*options: str, by: str = "KILL") -> tuple[str, ...]:
    """Return a launcher. The kernel sends the tool a signal when the thread that started it ends, so
    also when this process is killed.

    The kernel does not know of that wish until the launcher runs, and this process may be gone by
    then. So the launcher checks its parent afterwards, and does not start the tool for another one.

    :param options: of setpriv, for the rights of the tool
    :param by: the name of the signal
    """
    return ("setpriv", "--pdeathsig", by, *options, "--", "sh", "-c", _UNLESS_ORPHANED, str(os.getpid()))


def run_tool(
    program: str,
    *arguments: str,
    environment: Mapping[str, str],
    deadline_s: float,
    cure: str,
    launcher: tuple[str, ...] = (),
    cwd: Path | None = None,
    output: IO[bytes] | None = None,
    line: Callable[[str], None] = lambda _: None,
    tick: Callable[[], None] = lambda: None,
    grace_s: float = 0.0,
) -> Ran:
    """Run a program to its end and return its exit status.

    Standard output goes to `output` if it is given; the rest of the output is read here. `line` is
    called with each line, `tick` about ten times a second. `launcher` is a command that executes
    the program. Before the kill, the group gets SIGTERM and `grace_s` to clean up. A program that has
    such a time gets SIGTERM when this process is killed, and others are killed.

    :raises MissingTool: it is not in the environment's PATH; `cure` is the hint
    :raises NotFinished: it exceeded its deadline, or was killed from outside
    """
    launcher = (*ends_with_us(by="TERM" if grace_s else "KILL"), *launcher)
    for name, hint in ((program, cure), *((name, "install the packages util-linux and dash") for name in launcher)):
        if (name == program or name in _LAUNCHERS) and shutil.which(name, path=environment["PATH"]) is None:
            raise MissingTool(f"{name} is not installed", hint=hint)
    end = time.monotonic() + deadline_s
    stopping.check()
    process = subprocess.Popen(
        (*launcher, program, *arguments),
        executable=shutil.which(launcher[0], path=environment["PATH"]),
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output is None else output,
        stderr=subprocess.STDOUT if output is None else subprocess.PIPE,
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=_LINES_KEPT)

    def printed(text: str) -> None:
        lines.append(text)
        line(text)

    ended = os.pidfd_open(process.pid)
    try:
        pipe = process.stdout or process.stderr
        assert pipe is not None  # noqa: S101 - one of them is a pipe
        with pipe:
            if not _follow(pipe, ended, end, printed, tick):
                said = f"; its last output: {lines[-1]}" if lines else ""
                raise NotFinished(
                    f"{program} did not finish within {deadline_s:g} s{said}",
                    hint="check whether the disk or the network is overloaded, then try again",
                )
    finally:
        _end(process, ended, grace_s)
        os.close(ended)
    if -process.returncode in _FROM_OUTSIDE:
        raise NotFinished(
            f"{program} was killed by {signal.Signals(-process.returncode).name}",
            hint="check the kernel's log for lack of memory with `dmesg`, then try again",
        )
    return Ran(process.returncode, tuple(lines))


def _follow(pipe: IO[bytes], ended: int, end: float, printed: Callable[[str], None], tick: Callable[[], None]) -> bool:
    """Read the output of a program until it ends; return False at the deadline.

    Its children may still hold the pipe open.
    """
    os.set_blocking(pipe.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(ended, selectors.EVENT_READ)
        selector.register(pipe, selectors.EVENT_READ)
        gone = False
        while not gone:
            if time.monotonic() > end:
                return False
            stopping.check()
            tick()
            ready = {key.fd for key, _ in selector.select(_POLL_S)}
            gone = ended in ready
            while pipe.fileno() in ready and (data := _read(pipe)) is not None:
                if not data:
                    selector.unregister(pipe)
                    break
                *complete, rest = (rest + data).split(b"\n")
                rest = rest[-_CHUNK:]
                for raw in complete:
                    printed(raw.decode("utf-8", "replace").rstrip())
                stopping.check()
                if time.monotonic() > end:
                    return False
    if rest:
        printed(rest.decode("utf-8", "replace").rstrip())
    return True


def _read(pipe: IO[bytes]) -> bytes | None:
    """Return the next bytes: empty at the end of the stream, None if there are none now."""
    try:
        return os.read(pipe.fileno(), _CHUNK)
    except BlockingIOError:
        return None


def _end(process: subprocess.Popen[bytes], ended: int, grace_s: float) -> None:
    """Kill the program and its children, and then reap it, so that its process id is not reused
    before.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(ended, selectors.EVENT_READ)
        if grace_s and not selector.select(0):
            _signal(process.pid, signal.SIGTERM)
            selector.select(grace_s)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    # All have ended, or the rest belongs to another user.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
