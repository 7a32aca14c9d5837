"""Processes as the fakes look at them: stopped or not, ended or not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from coppice.model import VmmProcess


def is_stopped(pid: int) -> bool:
    """Whether the process has been stopped by SIGSTOP."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] == "T"


async def ended(process: VmmProcess) -> None:
    """Wait for the end of the process without collecting its status: that is for the driver to do."""
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
