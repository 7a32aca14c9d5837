"""Disk space reserved for the database.

SQLite can neither open nor change a database on a full disk. Without the reserve no command could
then list or remove anything.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_BYTES = 256 << 10  # the index of the write-ahead log needs 32 KiB, a removal a few pages of the log
LOW = 2 * _BYTES  # with less free space, the next commit may need the reserve


def keep(path: Path) -> None:
    """Make the reserve file and allocate its blocks; do nothing on a full disk. Idempotent.

    A sparse copy of the data directory loses the blocks, so they are checked each time.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_blocks * 512 < _BYTES:
                os.posix_fallocate(descriptor, 0, _BYTES)
        except OSError:
            path.unlink()
        finally:
            os.close(descriptor)


def release(path: Path) -> bool:
    """Remove the reserve to free its space; return whether it existed."""
    try:
        path.unlink()
    except OSError:
        return False
    return True
