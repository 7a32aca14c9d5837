"""Processes that a failed test leaves behind: they are found by what is the test's own, and ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
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
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                ended, _, _ = select.select([process], [], [], _END_S)
                assert ended, f"process {pid} does not end"
            finally:
                os.close(process)


@contextlib.contextmanager
def machines_ended(home: Path) -> Iterator[None]:
    """End the machines of a data directory after a block: a failed test may leave some."""
    try:
        yield
    finally:
        end({pid for pids in working_below(home.resolve() / "instances").values() for pid in pids})


def _processes() -> Iterator[Path]:
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
