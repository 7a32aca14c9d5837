"""Steps of a host process: each side effect and each commit, and death at one of them.

Nothing in the product knows of this. Side effects are seen by Python's own audit events (PEP 578), which are raised before the act; commits, signals and ptrace
calls, and what has been started, by wrapping the function.
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

from coppice.memory import remap
from coppice.model import Instance
from coppice.store.database import Database

_FILE_EVENTS = frozenset({"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.chmod"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_VARIABLE = re.compile(
    r"\b[a-z0-9]{24}\b|(?<=\.)[0-9a-f]{12}(?=\.tmp)|(?<=port)\d|^\d+$"
)  # ids, temporary names, ports, descriptors


class Steps:
    """Counts steps, and at the `deadly` one (from 1; 0: never) says its name and kills the process."""

    def __init__(self, deadly: int, say: Callable[[str], None]) -> None:
        self.names: list[str] = []
        self._deadly = deadly
        self._say = say
        self._counting = threading.Lock()
        self._armed = False

    def install(self) -> None:
        """See steps from now on; count them from `arm` on. There is no way back: audit hooks stay."""
        sys.addaudithook(self._audit)
        write, popen, ptrace = Database.write, subprocess.Popen.__init__, remap._ptrace
        steps = self

        @contextlib.contextmanager
        def counted_write(database: Database) -> Iterator[sqlite3.Connection]:
            what = _transaction(sys._getframe(2))
            with write(database) as connection:
                yield connection
                steps.step(f"in the transaction of {what}")
            steps.step(f"committed {what}")

        def counted_popen(process: subprocess.Popen[Any], argv: list[str], *args: Any, **kwargs: Any) -> None:
            popen(process, argv, *args, **kwargs)
            steps.step(f"started {_program(argv)}")

        def counted_ptrace(request: int, *args: Any) -> None:
            ptrace(request, *args)
            steps.step(f"ptrace {request:#x}")

        send = signal.pidfd_send_signal

        def counted_send(*args: Any) -> None:
            steps.step("signal to a VMM")
            send(*args)
            steps.step("signalled a VMM")

        Database.write = counted_write  # type: ignore[method-assign,assignment]
        subprocess.Popen.__init__ = counted_popen  # type: ignore[method-assign,assignment]
        remap._ptrace = counted_ptrace  # type: ignore[assignment]
        signal.pidfd_send_signal = counted_send

    def arm(self) -> None:
        """Count from here."""
        self._armed = True

    def disarm(self) -> None:
        """Count no more."""
        self._armed = False

    def step(self, name: str) -> None:
        """Come to a step."""
        if not self._armed:
            return
        with self._counting:
            self.names.append(name)
            if len(self.names) == self._deadly:
                self._say(name)
                os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event in _FILE_EVENTS:
            self.step(f"{event} {_shown(args[0])}")
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES and isinstance(args[0], str | Path):
            self.step(f"open {_shown(args[0])}")
        elif event == "subprocess.Popen":
            self.step(f"start {_program(args[1])}")
        elif event == "socket.connect":
            self.step(f"connect {_shown(args[1])}")


def _transaction(frame: FrameType) -> str:
    """The method of the store that writes, with what it writes of."""
    known = frame.f_locals
    details = [str(known["operation"])] if "operation" in known else []
    if isinstance(known.get("instance"), Instance):
        details.append(str(known["instance"].state))
    return " ".join([frame.f_code.co_name, *details, *(["done"] if known.get("done") else [])])


def _program(argv: list[str]) -> str:
    """What a command line starts, through its launchers."""
    return next((Path(str(word)).name for word in argv if "qemu-system" in str(word)), Path(str(argv[0])).name)


def _shown(path: object) -> str:
    """The last part of a path, without what differs from one run to the next."""
    return _VARIABLE.sub(
        "*", Path(os.fsdecode(path)).name if isinstance(path, str | bytes | os.PathLike) else str(path)
    )


def is_of_journal(name: str) -> bool:
    """Whether a step is a commit, the start or end of a process, a word to a VMM, or a name: what recovery decides by."""
    return name.startswith(
        ("committed", "in the", "start", "signal", "connect", "ptrace", "os.rename", "os.mkdir", "os.rmdir")
    )
