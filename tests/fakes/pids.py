"""Checks of the fakes' processes: whether they are paused, and whether they have ended."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from coppice.model import VmmProcess


def name_of(pid: int) -> str:
    """Return the process's name, which shows the fake VMM's latest action."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_paused(pid: int) -> bool:
    """Return whether the machine of a fake VMM is paused."""
    return name_of(pid) in ("fake-paused", "fake-saving", "fake-saved", "fake-unsaved")


def has_settled(pid: int) -> bool:
    """Return whether a fake VMM has finished every order, or has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    status = dict(line.split(":\t", 1) for line in lines)
    pending = any(int(status[name], 16) for name in ("SigPnd", "ShdPnd"))
    return not pending and status["State"][0] in "SZX" and status["Name"] != "fake-saving"


async def ended(process: VmmProcess) -> None:
    """Wait for the end of the process without reaping it: the driver does that."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(pidfd, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
