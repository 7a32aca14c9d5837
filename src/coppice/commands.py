"""The validator of ids, directories, signals and limits of commands in guests."""

from __future__ import annotations

import os
import re
from typing import Final

from coppice.errors import InvalidName, UsageError
from coppice.model.guest import MAX_KEPT

_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


PROCESS: Final = "main"
"""The id of a machine's process, as a command."""


def new_command_id() -> str:
    """Return a fresh id for a command in a guest, short enough to be typed."""
    return os.urandom(6).hex()


def check_command_id(command: str) -> None:
    """Check the id of a command in a guest.

    :raises InvalidName: it is not 1 to 64 letters, digits, `_`, `.` and `-`
    """
    if not _ID.fullmatch(command):
        shown = command if len(command) <= 80 else command[:77] + "..."
        raise InvalidName(f"{shown!r} is not the id of a command", hint="use 1 to 64 of A-Z, a-z, 0-9, _, . and -")


def check_new_id(command: str) -> None:
    """Check the id for a new command in a guest.

    :raises InvalidName: it is malformed, or that of the machine's process
    """
    check_command_id(command)
    if command == PROCESS:
        raise InvalidName(f"{PROCESS} is the id of the machine's process", hint="choose another id")


def check_signal(number: int) -> None:
    """Check the number of a signal.

    :raises UsageError: no signal has this number
    """
    if not 1 <= number <= 64:
        raise UsageError(f"there is no signal {number}", hint="signals are 1 to 64; 15 is SIGTERM, 9 is SIGKILL")


def check_workdir(path: str | None) -> None:
    """Check the working directory of a command or process in a guest: None or an empty one for the image's.

    :raises UsageError: it is not an absolute path
    """
    if path and (not path.startswith("/") or "\0" in path):
        raise UsageError(
            f"the working directory {path[:80]!r} is not an absolute path", hint="write one such as /srv/app"
        )


def check_kept(size: int) -> None:
    """Check how much output of a command is kept in its guest.

    :raises UsageError: it is nothing, or too much
    """
    if not 0 < size <= MAX_KEPT:
        raise UsageError(f"a guest cannot keep {size} bytes of output", hint=f"keep 1 byte to {MAX_KEPT >> 20} MiB")


def check_bound(count: int | None, what: str) -> None:
    """Check a limit of a command: None for none.

    :raises UsageError: it is below 1, or has more than 63 bits
    """
    if count is not None and not 0 < count < 1 << 63:
        raise UsageError(f"{count} is not a limit of {what}", hint="give a number above 0, or omit it")
