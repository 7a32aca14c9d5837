"""A little room that is kept for the database: on a full disk SQLite cannot even be opened, and then nobody could look, or remove anything."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_BYTES = 256 << 10  # the index of the write-ahead log takes 32 KiB, a removal some pages of the log


def keep(path: Path) -> None:
    """Have the file there, with its blocks, which a copy of the data directory leaves out; on a full disk, another time. Idempotent."""
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
    """Give its room back to the disk; whether there was any."""
    try:
        path.unlink()
    except OSError:
        return False
    return True
