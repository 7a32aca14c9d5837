"""Reading /proc/self/mountinfo (proc(5))."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MOUNTINFO = Path("/proc/self/mountinfo")


class Mount(NamedTuple):
    """One mount. `options` are those of the mount and of its file system; `root` is the directory
    shown.
    """

    point: PurePosixPath
    type: str
    options: frozenset[str]
    root: PurePosixPath = PurePosixPath("/")


def parse_mountinfo(text: str) -> list[Mount]:
    """Return all mounts in the order they were made; skip lines that do not parse."""
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if separator and len(fields) >= 6 and len(tail) >= 3:
            options = frozenset(fields[5].split(",")) | frozenset(tail[2].split(","))
            mounts.append(
                Mount(PurePosixPath(_unescape(fields[4])), tail[0], options, PurePosixPath(_unescape(fields[3])))
            )
    return mounts


def mount_of(path: PurePosixPath, mounts: list[Mount]) -> Mount | None:
    """Return the mount of an absolute path without links: the deepest, then the latest, mount."""
    holding = [mount for mount in mounts if path.is_relative_to(mount.point)]
    return max(reversed(holding), key=lambda mount: len(mount.point.parts), default=None)


def read_mounts() -> list[Mount]:
    """Return the mounts that this process sees."""
    return parse_mountinfo(MOUNTINFO.read_text(errors="surrogateescape"))


def _unescape(field: str) -> str:
    r"""Decode the octal escapes that the kernel writes for space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8) & 0xFF), field)
