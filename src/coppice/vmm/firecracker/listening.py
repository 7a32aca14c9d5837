"""Wait for a new process's socket by events: the directory is watched from before the process
starts.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from coppice.linux.inotify import Inotify
from coppice.model import VmmProcess
from coppice.vmm import sockets

_POLL_S = 0.002


class Watch(Inotify):
    """Watches a directory for files that are made or written to."""

    def __init__(self, directory: Path) -> None:
        """Start to watch.

        :raises HostCannot: this user has no inotify instance left
        """
        self._directory = directory
        super().__init__(directory)

    def until_listening(self, name: str, process: VmmProcess, deadline_s: float) -> bool:
        """Wait until the process listens on a socket of the directory. Blocks.

        Return False if it ends first, or at the deadline. A process makes the socket file just
        before it listens, and a connection in between is refused. No event tells that it listens now:
        releases before 1.16 write nothing to their log then. So that short time is polled.
        """
        end = time.monotonic() + deadline_s
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return False
        try:
            while not self._listens(name):
                left = max(end - time.monotonic(), 0)
                most = min(left, _POLL_S) if (self._directory / name).exists() else left
                ready, _, _ = select.select([self.fileno(), pidfd], [], [], most)
                if pidfd in ready or not left:
                    return False
                self.drain()
            return True
        finally:
            os.close(pidfd)

    def _listens(self, name: str) -> bool:
        try:
            sockets.connect(self._directory, name).close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True
