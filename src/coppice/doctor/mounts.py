"""Reading /proc/self/mountinfo (proc(5))."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MOUNTINFO = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    """One mount: where, of what type, with which options of the mount and of the file system."""

    point: PurePosixPath
    type: str
    options: frozenset[str]


def parse_mountinfo(text: str) -> list[Mount]:
    """All mounts, in the order they were made; lines that are not understood are left out."""
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if separator and len(fields) >= 6 and len(tail) >= 3:
            options = frozenset(fields[5].split(",")) | frozenset(tail[2].split(","))
            mounts.append(Mount(PurePosixPath(_unescape(fields[4])), tail[0], options))
    return mounts


def mount_of(path: PurePosixPath, mounts: list[Mount]) -> Mount | None:
    """The mount that an absolute path without links is on: the deepest, and of those at one point the last."""
    holding = [mount for mount in mounts if path.is_relative_to(mount.point)]
    return max(reversed(holding), key=lambda mount: len(mount.point.parts), default=None)


def read_mounts() -> list[Mount]:
    """The mounts this process sees."""
    return parse_mountinfo(MOUNTINFO.read_text(errors="surrogateescape"))


def _unescape(field: str) -> str:
    r"""The kernel writes space, tab, newline and backslash as \040 and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8) & 0xFF), field)
