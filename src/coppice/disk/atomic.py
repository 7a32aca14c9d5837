"""How a file comes into being: under a temporary name, then by one rename; and what its failures are called.

A killed process leaves at most a file with a temporary name, which `is_temporary` lets the recovery sweep recognise.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from coppice.errors import HostCannot, IntegrityError, NoSpace, Refused

TEMPORARY_SUFFIX = ".tmp"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the directory of `path`, so that a rename to `path` stays in one file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """Whether a file name is one of `temporary_beside`: nobody owns it once the process that made it is gone."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def sync_directory(directory: Path) -> None:
    """Make the renames and links done in `directory` survive a power loss."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temporary: Path, final: Path, *, sync: bool = True) -> None:
    """Rename a finished temporary file to its final name; with `sync` the name is durable on return.

    The caller has already synced the file's data.
    """
    temporary.rename(final)
    if sync:
        sync_directory(final.parent)


@contextlib.contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn an OSError inside of the block into a Coppice error that says what was being done.

    `action` completes the sentence "Cannot ...". Raises NoSpace for a full disk or quota, Refused where the
    destination exists, IntegrityError where a file that must be there is not, HostCannot for the rest.
    """
    try:
        yield
    except OSError as error:
        message = f"Cannot {action}: {error.strerror or error}"
        if error.errno in _FULL:
            raise NoSpace(
                message, hint="free some space on the file system of the data directory, or move it to a larger one"
            ) from error
        if error.errno == errno.EEXIST:
            raise Refused(message, hint="remove the file that is in the way, or choose another name") from error
        if error.errno == errno.ENOENT:
            raise IntegrityError(
                message, hint="a file that should be there is gone: remove what depends on it"
            ) from error
        if error.errno == errno.ELOOP:
            raise HostCannot(
                message, hint="put the file itself where the data directory has a symbolic link"
            ) from error
        raise HostCannot(message, hint="see that the data directory is writable and its disk is healthy") from error
