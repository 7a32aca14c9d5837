"""Publish files atomically, under a temporary name and then by one rename; translate OS errors.

A killed process leaves at most a file with a temporary name, which recovery recognises by
`is_temporary`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from coppice.errors import CoppiceError, HostCannot, IntegrityError, InUse, NoSpace, Refused

TEMPORARY_SUFFIX = ".tmp"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_HINTS = {
    errno.ELOOP: "replace the symbolic link in the data directory by the file itself",
    errno.EMLINK: "remove forks of it first: the file has as many hard links as its file system allows",
    errno.EXDEV: "keep the data directory on one file system",
}
_WHEN_TAKEN = "end the program that listens there (`ss -lnp` shows it), or choose another address"
_PLAIN_ADDRESS = "choose an address of this host, such as 127.0.0.1"
_OF_RIGHTS = "ports up to 1023 need root, and a socket needs a directory that this user may write to"
_OF_ADDRESSES = {
    None: "choose a shorter path: that of a socket has 107 bytes at most",  # Python's own check has no number
    errno.EADDRNOTAVAIL: "choose an address of this host, which `ip address` lists",
    errno.EACCES: _OF_RIGHTS,
    errno.EPERM: _OF_RIGHTS,
    errno.EROFS: _OF_RIGHTS,
    errno.ENOENT: "make the directory of the socket first",
    errno.ENOTDIR: "make the directory of the socket first",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def temporary_beside(path: Path) -> Path:
    """Return a fresh hidden name in the directory of `path`, so that renaming it to `path` stays in
    one file system.
    """
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}{TEMPORARY_SUFFIX}")


def is_temporary(name: str) -> bool:
    """Return whether a file name was made by `temporary_beside`.

    Such a file can be removed once its process has ended.
    """
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def setting_of(path: Path) -> str:
    """Return the value in a file of the kernel, "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def number_of(path: Path) -> int | None:
    """Return the number in a file of the kernel, None if it cannot be read."""
    try:
        return int(setting_of(path))
    except ValueError:
        return None


def sync(path: Path) -> None:
    """Make the data of a file, or the renames and links done in a directory, survive a power
    loss.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


sync_directory = sync


def allocated_bytes(path: Path) -> int:
    """Return the bytes that removing the path would free.

    Files with other hard links do not count.
    """
    total = 0
    for file in (path, *(Path(top, name) for top, _, names in os.walk(path) for name in names)):
        with contextlib.suppress(FileNotFoundError):  # removed at the same time
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                total += status.st_blocks * 512
    return total


def publish(temporary: Path, final: Path, *, sync: bool = True) -> None:
    """Rename a finished temporary file to its final name.

    With `sync`, the name is durable on return.

    The caller has already synced the file's data.
    """
    temporary.rename(final)
    if sync:
        sync_directory(final.parent)


class _Translating(contextlib.ContextDecorator):
    """A block, or a decorated function, whose OSError becomes a Coppice error. A generator would take five times
    the CPU time, and a fork has dozens of such blocks.
    """

    def __init__(self, action: str, error_of: Callable[[str, OSError], CoppiceError]) -> None:
        self._action = action
        self._error_of = error_of

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise self._error_of(_message(self._action, error), error) from error


def os_errors(action: str) -> _Translating:
    """Turn an OSError of one file operation into a Coppice error that names the operation and the
    path.

    `action` completes the sentence "Cannot ...". Raises NoSpace for a full disk or quota, Refused
    if the destination exists, IntegrityError if a required file is missing, else HostCannot. Use it
    only around blocks that work on files that must exist: elsewhere an OSError means something
    else; see `untranslated`.
    """
    return _Translating(action, _of_file)


def address_errors(action: str, *, when_taken: str = _WHEN_TAKEN) -> _Translating:
    """Turn an OSError of listening at an address into a Coppice error with a hint about the address.

    `when_taken` is the hint if another program uses the address. Raises InUse for that, NoSpace for
    a full disk, else HostCannot.
    """
    return _Translating(action, lambda _, error: _of_address(action, error, when_taken))


def untranslated(action: str) -> _Translating:
    """Turn an OSError that no lower layer translated into a Coppice error that adds no guess at the
    cause.

    For whole operations, whose siblings and callers expect Coppice errors. Raises NoSpace or
    HostCannot.
    """
    return _Translating(action, _of_operation)


def _of_file(message: str, error: OSError) -> CoppiceError:
    if error.errno in _FULL:
        return NoSpace(
            message, hint="free some space on the file system of the data directory, or move it to a larger one"
        )
    if error.errno == errno.EEXIST:
        return Refused(message, hint="remove the file that is in the way, or choose another name")
    if error.errno == errno.ENOENT:
        return IntegrityError(message, hint="a required file is missing: remove the instances that depend on it")
    return HostCannot(
        message,
        hint=_HINTS.get(error.errno or 0, "check that the data directory is writable and its disk is healthy"),
    )


def _of_address(action: str, error: OSError, when_taken: str) -> CoppiceError:
    # The text of Python's own servers repeats the address; a failed look-up of a name has a number below 0.
    number = error.errno or 0
    message = f"Cannot {action}: {os.strerror(number) if number > 0 else error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        return InUse(message, hint=when_taken)
    if error.errno in _FULL:
        return NoSpace(message, hint="free some space on the file system of the socket, or choose another path")
    return HostCannot(message, hint=_OF_ADDRESSES.get(error.errno, _PLAIN_ADDRESS))


def _of_operation(message: str, error: OSError) -> CoppiceError:
    if error.errno in _FULL:
        return NoSpace(message, hint="free disk space, or set COPPICE_HOME to a larger file system")
    return HostCannot(message, hint="`coppice doctor` checks this host; --debug shows the traceback")


def _message(action: str, error: OSError) -> str:
    where = "" if error.filename is None or str(error.filename) in action else f": {error.filename}"
    return f"Cannot {action}: {error.strerror or error}{where}"
