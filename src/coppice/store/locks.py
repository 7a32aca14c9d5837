"""Per-instance file locks, between tasks, threads and processes alike.

An operation that changes an instance holds its lock exclusively; a fork holds its source's lock shared, so that many forks go on at once and
nobody promotes, demotes, removes or re-captures the source meanwhile. The kernel frees the locks of a killed process.

A lock lasts as long as any descriptor of it (flock(2)): a process that this one forks, as multiprocessing does, would hold it for its whole life. So it
closes what it has inherited.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

from coppice.errors import Busy

_held: set[int] = set()


def _hold_none() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_hold_none)


def take(descriptor: int) -> bool:
    """Lock an open file against all others, at once; False where somebody holds it. Whoever opened it closes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for(descriptor: int, deadline_s: float, busy: Busy) -> None:
    """Lock an open file as `take` does, and try again each millisecond: flock has no event to wait for with a deadline. Blocks; raises `busy` beyond it."""
    end = time.monotonic() + deadline_s
    while not take(descriptor):
        if time.monotonic() >= end:
            raise busy
        time.sleep(0.001)


def keep(descriptor: int) -> None:
    """Have a lock that was taken elsewhere closed in processes that are forked; `release` frees it."""
    _held.add(descriptor)


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Take the lock at once and return its file descriptor, or None if somebody holds it. `release` frees it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            held = os.fstat(descriptor)
            named = path.stat() if path.exists() else None
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            named = None
        except BaseException:
            os.close(descriptor)
            raise
        if named is not None and (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino):
            keep(descriptor)
            return descriptor
        os.close(descriptor)  # the file was removed with its instance between open and flock: lock the new one


def release(descriptor: int) -> None:
    """Let go of what `try_lock` gave or `keep` took; in a process that was forked meanwhile there is nothing to let go of."""
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


@contextlib.asynccontextmanager
async def hold(
    path: Path, *, shared: bool = False, deadline_s: float = 60.0, what: str = "the instance"
) -> AsyncIterator[None]:
    """Hold a lock for the length of the block.

    flock has no event to await with a deadline, so the wait tries again every 2 to 20 ms.

    :raises Busy: it could not be had within `deadline_s`
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    pause = 0.002
    while (descriptor := try_lock(path, shared=shared)) is None:
        if loop.time() >= end:
            raise Busy(
                f"another operation holds {what} for more than {deadline_s:g} s", hint="wait for it, then try again"
            )
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  (jitter against lock-step, not a secret)
        pause = min(pause * 1.5, 0.02)
    try:
        yield
    finally:
        release(descriptor)
