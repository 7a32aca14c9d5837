"""Find out by trying whether a file system has reflinks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from coppice.linux.clone import clone_file
from coppice.model import MIB


def has_reflinks(directory: Path, prefix: str = "probe-") -> bool:
    """Return whether the file system of a directory clones files without copying, by trying it.

    :param prefix: begins the name of the temporary directory
    :raises OSError: nothing can be written there
    :raises NoSpace, HostCannot: as `clone_file`
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix=prefix) as temporary:
        source = Path(temporary, "source")
        source.write_bytes(b"\xa5" * MIB)
        return clone_file(source, Path(temporary, "clone")).method == "reflink"
