"""SHA-256 of captures in the background.

Starts the program `coppice.integrity.digests`. The program ends with the host unless it is
detached.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
from pathlib import Path

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError
from coppice.host.opened import Background
from coppice.integrity import digests
from coppice.integrity.digests import step_aside
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Snapshot, VmmProcess
from coppice.vmm import process as processes
from coppice.vmm import starting

_log = logging.getLogger(__name__)


class Hashing:
    """The background hashing of one open host.

    If the program cannot start, captures have no digest until `verify`; no operation fails.
    """

    def __init__(self, rooms: Rooms, background: Background) -> None:
        self._rooms = rooms
        self._background = background
        self._starting: set[asyncio.Task[None]] = set()
        self._processes: list[VmmProcess] = []

    def resume(self) -> None:
        """Continue the hashing that a closed or killed host left unfinished."""
        if self._background == "owned":
            self._soon()

    def captured(self, *made: Instance | Snapshot) -> None:
        """Start hashing if any of these lacks a digest. Does not wait, and cannot fail."""
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
        """Start the program, and pass it the lock that allows one such program at a time.

        Do nothing if every capture has a digest, or if another program holds the lock: that program
        checks for new captures before it ends.
        """
        if not sys.executable or not digests.any_lacking(self._rooms.layout, self._rooms.store):
            return
        lock = os.open(self._rooms.layout.locks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process = starting.spawn(
                [sys.executable, "-P", "-m", digests.__name__, str(self._rooms.layout.home), str(lock)],
                cwd=Path("/"),  # a working directory would keep its file system from being unmounted
                log=Path(os.devnull),
                pass_fds=(lock,),
            )
            if self._background == "owned":
                self._processes.append(process)  # in this thread, so that no cancellation comes between
            step_aside(process.pid)
        except BlockingIOError:
            return
        finally:
            os.close(lock)

    async def close(self) -> None:
        """End the owned programs, and wait until they are gone. Idempotent."""
        await complete(self._close())

    async def _close(self) -> None:
        while self._starting:
            await asyncio.gather(*self._starting)
        while self._processes:
            await processes.kill(self._processes.pop())
