"""Processes as the fakes look at them: paused or not, ended or not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from coppice.model import VmmProcess


def is_paused(pid: int) -> bool:
    """Whether the machine of a fake VMM is paused."""
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "fake-paused\n"
    except (FileNotFoundError, ProcessLookupError):
        return False


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
