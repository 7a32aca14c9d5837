"""Helpers for a process's memory: capture it in one call, and check whether it shares a
mem-file.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from coppice.linux import tracing
from coppice.linux.files import os_errors
from coppice.linux.maps import identify, read_maps
from coppice.memory.capture import CaptureStats, PrivateCapture
from coppice.model import MemFile


def capture_private(pid: int, base: Path, expected: MemFile, out: Path) -> tuple[MemFile, CaptureStats]:
    """Capture a paused guest in one call. Raises the errors of the steps of `PrivateCapture`."""
    with PrivateCapture(base, expected, out) as capture:
        capture.prepare()
        capture.collect(pid)
        taken = capture.finish()
        return taken.mem_file, taken.stats


def mapping_is_shared(pid: int, path: Path, expected: MemFile) -> bool:
    """Return whether the process maps the whole expected mem-file privately, so that it shares
    unmodified pages.

    The result is False if a driver silently copied: no mapping of that inode, only a part of it, or
    other memory instead.

    Raises VmmDied if the process has ended, IntegrityError if the file is missing, HostCannot.
    """
    with os_errors(f"look at {path}"):
        inode = path.lstat().st_ino
    identity = identify(path)
    mapped = sum(vma.length for vma in read_maps(pid) if vma.file == identity and vma.private)
    return inode == expected.inode and mapped >= expected.size_bytes


def die_after(calls: int) -> None:
    """Have this process killed after this many ptrace calls."""
    real, made = tracing.ptrace, 0

    def counted(request: int, *arguments: object) -> None:
        nonlocal made
        real(request, *arguments)  # type: ignore[arg-type]  # whatever they are
        made += 1
        if made == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    tracing.ptrace = counted  # type: ignore[assignment]  # the same but for its type
