"""SHA-256 of captures in the background: starts the program of `coppice.instance.digests`, and ends it with the host unless it is to outlive it."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
from pathlib import Path
from typing import Literal

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError
from coppice.instance import digests
from coppice.instance.digests import step_aside
from coppice.instance.rooms import Rooms
from coppice.model import Instance, Snapshot, VmmProcess
from coppice.vmm import process as processes

_log = logging.getLogger(__name__)

Background = Literal["owned", "detached", "off"]
"""What becomes of background work when the host is closed: it ends, or goes on by itself; or there is none."""


class Hashing:
    """The background hashing of one opened host. Where it cannot be had, captures have no digest until they are verified: nothing else fails."""

    def __init__(self, rooms: Rooms, background: Background) -> None:
        self._rooms = rooms
        self._background = background
        self._starting: set[asyncio.Task[None]] = set()
        self._processes: list[VmmProcess] = []

    def resume(self) -> None:
        """Take up what a host that was closed or killed has left."""
        if self._background == "owned":
            self._soon()

    def captured(self, *made: Instance | Snapshot) -> None:
        """Have what lacks a digest among these computed. Does not wait, and cannot fail."""
        if self._background != "off" and any(digests.lacking(each) for each in made):
            self._soon()

    def _soon(self) -> None:
        task = asyncio.create_task(self._start())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start(self) -> None:
        try:
            self._processes = [each for each in self._processes if processes.reap(each) is None]
            await in_thread(self._spawn)
        except (CoppiceError, OSError) as error:
            _log.warning("captures are not hashed in the background: %s", error)

    def _spawn(self) -> None:
        """Start the program with the lock that it works under, unless there is nothing to do, or another one has it: that one looks again at its end."""
        if not sys.executable or not digests.any_lacking(self._rooms.layout, self._rooms.store):
            return
        lock = os.open(self._rooms.layout.locks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process = processes.spawn(
                [sys.executable, "-P", "-m", digests.__name__, str(self._rooms.layout.home), str(lock)],
                cwd=Path("/"),  # it must not keep a file system busy by its mere presence
                log=Path(os.devnull),
                pass_fds=(lock,),
            )
            if self._background == "owned":
                self._processes.append(process)  # here, where no cancellation comes between
            step_aside(process.pid)
        except BlockingIOError:
            return
        finally:
            os.close(lock)

    async def close(self) -> None:
        """End what is owned, and wait until it is gone. Idempotent."""
        await complete(self._close())

    async def _close(self) -> None:
        while self._starting:
            await asyncio.gather(*self._starting)
        while self._processes:
            await processes.kill(self._processes.pop())
