"""Count the steps of a host process, which are its side effects and commits, and kill the process
at one of them.

The product has no hooks for this. Python's audit events (PEP 578) report side effects before they
happen. Commits, signals, ptrace calls and started processes are reported by wrapped functions.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from coppice.linux import tracing
from coppice.memory import capture
from coppice.model import Instance, Record
from coppice.state.database import Database

_FILE_EVENTS = frozenset({"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.chmod"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_VARIABLE = re.compile(
    r"\b[a-z0-9]{24}\b|(?<=\.)[0-9a-f]{12}(?=\.tmp)|(?<=port)\d|^\d+$"
)  # ids, temporary names, ports, descriptors


_AFTER_ITS_PARENT = 'while read -r _ _ _ parent _ </proc/$$/stat; [ "$parent" = "$0" ]; do sleep 0.01; done; exec "$@"'
"""A program that the host starts in its last step begins when the host is dead, so it can ask for nothing before."""


class Measured(Record, frozen=True, kw_only=True):
    """An operation that was not killed: its steps, and its duration without opening and closing
    the host.
    """

    steps: list[str]
    wall_s: float


class Steps:
    """A counter of steps. At step number `deadly` (from 1; 0: never), or at the first step whose name
    begins so, it prints the step's name and kills the process.
    """

    def __init__(self, deadly: int | str, say: Callable[[str], None]) -> None:
        self.names: list[str] = []
        self._deadly = deadly
        self._say = say
        self._counting = threading.Lock()
        self._armed = False

    def install(self) -> None:
        """Observe steps from now on, and count them from `arm` on. Audit hooks cannot be
        removed.
        """
        sys.addaudithook(self._audit)
        write, popen, ptrace = Database.write, subprocess.Popen.__init__, tracing.ptrace
        steps = self

        @contextlib.contextmanager
        def counted_write(database: Database, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
            what = _transaction(sys._getframe(2))
            with write(database, durable=durable) as connection:
                yield connection
                steps.step(f"in the transaction of {what}")
            steps.step(f"committed {what}")

        def counted_popen(process: subprocess.Popen[Any], argv: list[str], *args: Any, **kwargs: Any) -> None:
            name = f"started {_program(argv)}"
            if steps.kills_at(name):
                kwargs["executable"] = "/bin/sh"
                argv = ["sh", "-c", _AFTER_ITS_PARENT, str(os.getpid()), *argv]
            popen(process, argv, *args, **kwargs)
            steps.step(name)

        def counted_ptrace(request: int, *args: Any) -> None:
            ptrace(request, *args)
            steps.step(f"ptrace {request:#x}")

        send = signal.pidfd_send_signal

        def counted_send(*args: Any) -> None:
            steps.step("signal to a VMM")
            send(*args)
            steps.step("signalled a VMM")

        capture._WORTH_BYTES = 0  # the fakes have few pages, and copy them before the pause all the same
        Database.write = counted_write  # type: ignore[method-assign,assignment]
        subprocess.Popen.__init__ = counted_popen  # type: ignore[method-assign,assignment]
        tracing.ptrace = counted_ptrace  # type: ignore[assignment]
        signal.pidfd_send_signal = counted_send

    def arm(self) -> None:
        """Start counting."""
        self._armed = True

    def disarm(self) -> None:
        """Stop counting."""
        self._armed = False

    def kills_at(self, name: str) -> bool:
        """Return whether the process dies at a step of this name, whatever its number."""
        return self._armed and isinstance(self._deadly, str) and name.startswith(self._deadly)

    def step(self, name: str) -> None:
        """Record a step."""
        if not self._armed:
            return
        with self._counting:
            self.names.append(name)
            if self.kills_at(name) or len(self.names) == self._deadly:
                self._say(name)
                self.disarm()  # the SIGKILL is not a step
                os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event in _FILE_EVENTS:
            self.step(f"{event} {_shown(args[0])}")
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES and isinstance(args[0], str | Path):
            self.step(f"open {_shown(args[0])}")
        elif event == "os.kill":  # an order to a fake VMM
            self.step(f"signal {args[1]}")
        elif event == "subprocess.Popen":
            self.step(f"start {_program(args[1])}")
        elif event == "socket.connect":
            self.step(f"connect {_shown(args[1])}")


def _transaction(frame: FrameType) -> str:
    """Return the name of the store's method that writes, with the operation and state."""
    known = frame.f_locals
    details = [str(known["operation"])] if "operation" in known else []
    if isinstance(known.get("instance"), Instance):
        details.append(str(known["instance"].state))
    return " ".join([frame.f_code.co_name, *details, *(["done"] if known.get("done") else [])])


def _program(argv: list[str]) -> str:
    """Return the launcher and the program of a command line of QEMU; of another one, its first word."""
    launcher = Path(str(argv[0])).name
    return next((f"{launcher} {Path(str(word)).name}" for word in argv if "qemu-system" in str(word)), launcher)


def _shown(path: object) -> str:
    """Return the last part of a path, without parts that differ between runs."""
    return _VARIABLE.sub(
        "*", Path(os.fsdecode(path)).name if isinstance(path, str | bytes | os.PathLike) else str(path)
    )


def is_of_journal(name: str) -> bool:
    """Return whether recovery depends on a step: a commit, a process, a VMM command, or a file
    name.
    """
    return name.startswith(
        ("committed", "in the", "start", "signal", "connect", "ptrace", "os.rename", "os.mkdir", "os.rmdir")
    )


def is_repeated(name: str) -> bool:
    """Return whether one call takes the step many times: for each register of a VMM, each port, or each attempt."""
    return name.startswith(("ptrace", "connect", "open port", "os.remove port"))
