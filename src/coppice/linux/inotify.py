"""Events of files that are made or written to, by inotify(7)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from coppice.linux.files import os_errors

_IN_MODIFY, _IN_CREATE = 0x2, 0x100
_libc = ctypes.CDLL(None, use_errno=True)

# Inotify instances that nobody uses. The kernel closes one in 10 to 20 ms, because it waits until no
# CPU uses the removed watch (synchronize_srcu), so they are kept: as many as were used at once.
_idle: list[int] = []


class Inotify:
    """Watches a file for writes, or a directory also for new files."""

    def __init__(self, path: Path) -> None:
        """Start to watch.

        :raises HostCannot: the path does not exist, or this user has no inotify instance left
        """
        with os_errors(f"watch {path}"):
            try:
                self._descriptor = _idle.pop()
            except IndexError:
                self._descriptor = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
            try:
                self._watch = _checked(
                    _libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_CREATE | _IN_MODIFY)
                )
            except BaseException:
                _idle.append(self._descriptor)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # This fails if the file was removed: then so was the watch.
        _libc.inotify_rm_watch(self._descriptor, self._watch)
        self.drain()
        _idle.append(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor, which is readable after an event."""
        return self._descriptor

    def drain(self) -> None:
        """Forget the events so far. Does not block."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 1 << 16)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
