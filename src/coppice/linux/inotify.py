"""Events of files that are made or written to, by inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from coppice.linux.files import os_errors

_IN_MODIFY, _IN_CREATE = 0x2, 0x100
_EVENT = struct.Struct("iIII")  # number of the watch, mask, cookie, size of the name that follows
_libc = ctypes.CDLL(None, use_errno=True)

# Inotify instances that nobody uses. The kernel closes one in 10 to 20 ms, because it waits until no
# CPU uses the removed watch (synchronize_srcu), so they are kept: as many as were used at once.
_idle: list[int] = []


class Watches:
    """Watches any number of files for writes."""

    def __init__(self) -> None:
        """Watch nothing yet.

        :raises HostCannot: this user has no inotify instance left
        """
        self._watched: set[int] = set()
        with os_errors("watch files"):
            self._descriptor = _idle.pop() if _idle else _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watch in tuple(self._watched):
            self.remove(watch)
        while self.changed():
            pass
        _idle.append(self._descriptor)

    def add(self, path: Path) -> int:
        """Watch a file for writes, or a directory for new files; return the number of the watch.

        :raises IntegrityError: the path does not exist
        :raises HostCannot: this user has no watch left
        """
        with os_errors(f"watch {path}"):
            watch = _checked(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_CREATE | _IN_MODIFY))
        self._watched.add(watch)
        return watch

    def remove(self, watch: int) -> None:
        """End a watch. Idempotent."""
        self._watched.discard(watch)
        _libc.inotify_rm_watch(self._descriptor, watch)  # fails if the file was removed: then so was the watch

    def fileno(self) -> int:
        """Return the descriptor, which is readable after an event."""
        return self._descriptor

    def changed(self) -> set[int]:
        """Return the numbers of watches with events since the last call; -1: events were lost. Does not block."""
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return set()
        found, at = set(), 0
        while at < len(data):
            watch, _, _, size = _EVENT.unpack_from(data, at)
            found.add(watch)
            at += _EVENT.size + size
        return found


class Inotify(Watches):
    """Watches one file for writes, or a directory also for new files."""

    def __init__(self, path: Path) -> None:
        """Start to watch.

        :raises IntegrityError: the path does not exist
        :raises HostCannot: this user has no inotify instance left
        """
        super().__init__()
        try:
            self.add(path)
        except BaseException:
            _idle.append(self._descriptor)
            raise

    def drain(self) -> None:
        """Forget the events so far. Does not block."""
        self.changed()


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
