"""Per-instance file locks, between tasks, threads and processes alike.

An operation that changes an instance holds its lock exclusively; a fork holds its source's lock shared, so that many forks go on at once and
nobody promotes, demotes, removes or re-captures the source meanwhile. The kernel frees the locks of a killed process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

from coppice.errors import Busy


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """Take the lock at once and return its file descriptor, or None if somebody holds it. Closing the descriptor frees it."""
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
            return descriptor
        os.close(descriptor)  # the file was removed with its instance between open and flock: lock the new one


def release(descriptor: int) -> None:
    """Let go of what `try_lock` gave."""
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
