"""Processes that a failed test leaves behind: they are found by what is the test's own, and ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_END_S: Final = 20.0


def working_below(directory: Path) -> dict[str, set[int]]:
    """Return every process whose working directory is below `directory`, by the first name below it.

    A VMM works in the directory of its instance.
    """
    found: dict[str, set[int]] = {}
    for process in _processes():
        with contextlib.suppress(OSError):
            where = (process / "cwd").readlink()
            if where.is_relative_to(directory) and where != directory:
                found.setdefault(where.relative_to(directory).parts[0], set()).add(int(process.name))
    return found


def tools_left(home: Path, within_s: float = _END_S) -> dict[int, str]:
    """Return the command of every tool that works on a data directory and does not end within that time.

    A tool has a file of the directory open, or names one in its command. Machines work in their
    directories, and Python processes are hosts.
    """
    machines = {pid for pids in working_below(home / "instances").values() for pid in pids}
    found = {}
    for process in _processes():
        with contextlib.suppress(OSError):
            if int(process.name) in machines or _is_host(process) or not _uses(process, str(home)):
                continue
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            with _opened(int(process.name)) as opened:
                if not _ends(opened, within_s):
                    found[int(process.name)] = command
    return found


def _is_host(process: Path) -> bool:
    return (process / "exe").samefile(sys.executable)


def _uses(process: Path, home: str) -> bool:
    """Return whether a process has a file below `home` open or in its command."""
    if f"{home}/".encode() in (process / "cmdline").read_bytes():
        return True
    return any(os.readlink(entry).startswith(f"{home}/") for entry in (process / "fd").iterdir())  # noqa: PTH115


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[int]:
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)


def _ends(process: int, within_s: float = _END_S) -> bool:
    """Wait for the end of an open process; return whether it has ended."""
    return bool(select.select([process], [], [], within_s)[0])


def in_network(namespace: Path) -> set[int]:
    """Return every process in a network namespace, as far as this user can see that."""
    found = set()
    for process in _processes():
        with contextlib.suppress(OSError):
            if os.path.samestat((process / "ns/net").stat(), namespace.stat()):
                found.add(int(process.name))
    return found


def end(pids: Iterable[int]) -> None:
    """Kill processes, and wait for their end."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError), _opened(pid) as process:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            assert _ends(process), f"process {pid} does not end"


@contextlib.contextmanager
def machines_ended(home: Path) -> Iterator[None]:
    """End the machines of a data directory after a block: a failed test may leave some. End the hashing
    of its captures too, which a killed host leaves: it would still use the database.
    """
    try:
        yield
    finally:
        end({pid for pids in working_below(home.resolve() / "instances").values() for pid in pids})
        end(_named(home))


def _named(home: Path) -> set[int]:
    """Return every process that has a data directory as a word of its command."""
    found = set()
    for process in _processes():
        with contextlib.suppress(OSError):
            if str(home).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found


def _processes() -> Iterator[Path]:
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
