"""Make slots for the next burst while no fork waits for one, in a process of its own.

Slots are made when fewer than half of the wanted ones are free. A new slot takes more CPU time than all
else of a fork, and the import of pyroute2 ten times as much. A command that forks has ended long before
that is done, and a process that forks many would do it in place of forks.

The process holds the lock of `refill.lock`. The time of that file's last change is that of the latest
fork.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import Final

from coppice.network.nat.helper import start_helper, take
from coppice.network.nat.pool import Pool

LOCK: Final = "refill.lock"
_LOG: Final = "refill.log"
_FEWEST: Final = 8
_MOST: Final = 64
_QUIET_S: Final = 0.05  # without a fork before slots are made: both need the same lock of the kernel


def request(pool: Pool) -> None:
    """Note that a slot was taken, and have more made if few are free. Blocks for a millisecond at most.

    :raises OSError: the process cannot be started
    """
    with contextlib.suppress(FileNotFoundError):  # the pool was closed meanwhile
        lock = os.open(pool.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.utime(lock)
            if _few_are_free(pool) and take(lock):
                arguments = [str(pool.root), pool.key, str(pool.host or ""), str(pool.resolv_conf)]
                start_helper("coppice.network.nat.refill", arguments, (lock,), pool.root / _LOG)
        finally:
            os.close(lock)


def _few_are_free(pool: Pool) -> bool:
    used = len(pool.used())
    return used > 0 and pool.free() * 2 < _wanted(used)


def _wanted(used: int) -> int:
    return min(_MOST, max(_FEWEST, used))


def _fill(pool: Pool, lock: int) -> None:
    """Make slots until enough are free. Each fork meanwhile begins a new quiet time."""
    begun = None
    while begun != os.fstat(lock).st_mtime_ns:
        # A fork gives no event that this could await. A clock that was set back makes no long pause.
        while 0 < (left := os.fstat(lock).st_mtime + _QUIET_S - time.time()) <= _QUIET_S:
            time.sleep(left)
        begun = os.fstat(lock).st_mtime_ns
        pool.fill(_wanted(len(pool.used())), while_true=lambda: os.fstat(lock).st_mtime_ns == begun)  # noqa: B023


def main(root: str, key: str, host: str, resolv_conf: str, inherited: str) -> None:
    """Run as the process, whose starter holds the lock."""
    pool, lock = Pool(key, Path(host) if host else None, Path(root).parent, Path(resolv_conf)), int(inherited)
    while True:
        _fill(pool, lock)
        fcntl.flock(lock, fcntl.LOCK_UN)
        # A fork that found the lock taken just before this relies on this process.
        if not _few_are_free(pool) or not take(lock):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
