"""File locks of instances, between tasks, threads and processes.

An operation that changes an instance holds its lock exclusively. A fork holds its source's lock
shared: many forks run at once, and meanwhile no operation promotes, demotes, removes or captures
the source. The kernel frees the locks of a killed process.

The lock is flock(2) of a file. A *turnstile* keeps overlapping shared holders from starving an
exclusive waiter. It is an open file description lock (fcntl_locking(2)) on the first byte of the
same file, independent of flock. An exclusive waiter in `hold` holds the turnstile exclusively; a
taker of the shared lock passes it in shared mode. So current holders finish, new ones wait, and the
exclusive waiter is next. It leaves the turnstile when it has the lock. Waiting shared takers keep
their place in the turnstile, so neither kind can starve the other.

Both locks last as long as any descriptor of the open file. A process forked from this one, as by
multiprocessing, would hold them all its life, so it closes the descriptors that it inherits.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from coppice.errors import Busy, NotFound

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_TURN_S = 1.0  # those who ask whether a lock is held have it for microseconds
_held: set[int] = set()


def _hold_none() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_hold_none)


def take(descriptor: int) -> bool:
    """Try once to lock an open file exclusively; return False if it is locked.

    The caller closes the file.
    """
    return _flock(descriptor, shared=False)


def wait_for(descriptor: int, deadline_s: float, busy: Busy) -> None:
    """Lock an open file as `take` does, retrying each millisecond. Blocks.

    flock has no event to wait for with a deadline.

    :raises Busy: the given `busy`, at the deadline
    """
    end = time.monotonic() + deadline_s
    while not take(descriptor):
        if time.monotonic() >= end:
            raise busy
        time.sleep(0.001)


def keep(descriptor: int) -> None:
    """Close the descriptor of a lock in processes forked from this one.

    `release` frees the lock.
    """
    _held.add(descriptor)


class _Place:
    """An open lock file, and the place in its turnstile, which is kept between two attempts."""

    def __init__(self, path: Path, *, shared: bool, create: bool = True) -> None:
        self._path = path
        self._shared = shared
        self._flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY | os.O_NOFOLLOW
        self._descriptor: int | None = None

    def take(self, *, queue: bool) -> int | None:
        """Try to take the lock; return its descriptor, or None.

        The result is None if the lock is held or, for a shared lock, if an exclusive waiter is
        queued. With `queue` the place in the turnstile is kept for the next attempt; `leave` gives
        it up.
        """
        while True:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, self._flags | os.O_CLOEXEC, 0o600)
                keep(self._descriptor)
            descriptor = self._descriptor
            passes = not (queue or self._shared)  # a taker that does not wait may overtake the waiters
            turned = passes or _turnstile(descriptor, fcntl.F_RDLCK if self._shared else fcntl.F_WRLCK)
            taken = turned and _flock(descriptor, shared=self._shared)
            if taken and _is_named(descriptor, self._path):
                if not passes:
                    _turnstile(descriptor, fcntl.F_UNLCK)
                self._descriptor = None
                return descriptor
            if _is_named(descriptor, self._path):
                if not queue:
                    self.leave()
                return None
            self.leave()  # the file was removed with its instance: lock the new one

    def leave(self) -> None:
        """Close the file if the lock was not taken. Idempotent."""
        if self._descriptor is not None:
            release(self._descriptor)
            self._descriptor = None


def _flock(descriptor: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _turnstile(descriptor: int, kind: int) -> bool:
    """Lock or unlock the turnstile of an open lock file; return False if an earlier waiter holds
    it.
    """
    return _byte(descriptor, kind, 0)


def _byte(descriptor: int, kind: int, place: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0))
    except BlockingIOError:
        return False
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def try_lock(path: Path, *, shared: bool = False, create: bool = True) -> int | None:
    """Try to take the lock; return its file descriptor, or None if it is held. `release` frees it.

    A shared lock is also refused while `hold` waits for the exclusive one. The lock is always that
    of the file which the path names on return, never of a removed predecessor. Without `create` the
    path, which may be a directory, is locked as it is, and None can also mean that it does not
    exist.
    """
    place = _Place(path, shared=shared, create=create)
    try:
        return place.take(queue=False)
    except FileNotFoundError:
        if create:
            raise
        return None
    finally:
        place.leave()


def is_held(path: Path) -> bool:
    """Return whether a lock is held; False without a file. Blocks for an instant.

    The kernel answers that only by giving the lock. So those who ask take turns, by a lock on the second byte of
    the file: otherwise each would take the others for holders.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    keep(descriptor)
    try:
        end = time.monotonic() + _TURN_S
        while not _byte(descriptor, fcntl.F_WRLCK, 1) and time.monotonic() < end:
            time.sleep(0.0005)
        return not take(descriptor)
    finally:
        release(descriptor)


def holder_is_gone(path: Path) -> bool:
    """Return whether the process that took the lock of this file has ended.

    The lock is still held while a child of that process has not yet started its own program.
    Source: /proc/locks (proc_locks(5)), which names the process that took each lock.
    """
    inode = str(path.stat().st_ino)
    for entry in Path("/proc/locks").read_text().splitlines():
        _, kind, _, _, pid, file, *_ = entry.replace("-> ", "").split()
        if kind == "FLOCK" and file.rpartition(":")[2] == inode and pid.isdecimal() and int(pid) > 0:
            return not Path("/proc", pid).exists()
    return False


def release(descriptor: int) -> None:
    """Free a lock from `try_lock` or `keep`; do nothing in a process that was forked meanwhile."""
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


@contextlib.asynccontextmanager
async def hold(
    path: Path, *, shared: bool = False, deadline_s: float = 60.0, what: str = "the instance"
) -> AsyncIterator[None]:
    """Hold a lock for the length of the block. Every waiter gets its turn.

    A file lock has no event to await with a deadline, so the wait tries again every 2 to 20 ms. A
    task must not take a lock again that it holds shared: an exclusive waiter in between would
    deadlock with that task.

    :raises Busy: the lock was not free within `deadline_s`
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    pause = 0.002
    place = _Place(path, shared=shared)
    try:
        while (descriptor := place.take(queue=True)) is None:
            if loop.time() >= end:
                raise Busy(
                    f"another operation has locked {what} for more than {deadline_s:g} s",
                    hint="wait for it, then try again",
                )
            jitter = 0.5 + os.urandom(1)[0] / 256  # against lock-step
            await asyncio.sleep(pause * jitter)
            pause = min(pause * 1.5, 0.02)
    finally:
        place.leave()
    try:
        yield
    finally:
        release(descriptor)


@contextlib.asynccontextmanager
async def hold_one_of(paths: Sequence[Path], *, deadline_s: float, what: str) -> AsyncIterator[None]:
    """Hold any one of several locks for the length of the block, so that only as many blocks run at
    once as there are paths.

    :raises Busy: none was free within `deadline_s`
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while (descriptor := next((found for path in paths if (found := try_lock(path)) is not None), None)) is None:
        if loop.time() >= end:
            raise Busy(f"{what} took more than {deadline_s:g} s", hint="wait, then try again")
        await asyncio.sleep(0.05)
    try:
        yield
    finally:
        release(descriptor)


def remove(path: Path) -> None:
    """Remove the lock file of a removed object; the caller holds its lock.

    Waiters then find that the path names another file.

    Taking a lock makes its file, even for an object that was just removed. So a holder that finds
    no record removes the file again.
    """
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def of_record(path: Path, what: str) -> Iterator[None]:
    """Look up the record of a lock that the caller holds: if the block raises NotFound, `remove`
    the lock file.

    :param what: the name that the record had, for the error. The caller may not know its id
    """
    try:
        yield
    except NotFound as error:
        remove(path)
        raise NotFound(f"{what} was removed by another operation", hint=error.hint) from error
