"""Find out by trying whether a file system has reflinks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from coppice.linux.clone import clone_contents
from coppice.linux.files import os_errors

_BYTES = 64 << 10


@os_errors("try a reflink")
def has_reflinks(directory: Path) -> bool:
    """Return whether the file system of a directory clones files without copying, by trying it.

    The files have no names, so a killed process leaves none.

    :raises NoSpace, HostCannot: nothing can be written there, or not without a name, as on NFS
    """
    with _unnamed(directory) as source, _unnamed(directory) as clone:
        os.pwrite(source, b"\xa5" * _BYTES, 0)
        return clone_contents(source, clone, reflink=True).method == "reflink"


@contextlib.contextmanager
def _unnamed(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
