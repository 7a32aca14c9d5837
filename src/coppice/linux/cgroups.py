"""Read the limits that control groups set for this process: memory, CPU time and tasks.

Every group from the process's own up to the topmost visible one can set a limit; the lowest
applies. Versions 1 and 2 of the interface are supported, also mixed on one host. See cgroups(7)
and Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from coppice.linux.files import setting_of
from coppice.linux.mounts import Mount, parse_mountinfo

_ROOT = Path("/")
_PID_MAX_DEFAULT = 32768  # the kernel's default, used if /proc/sys cannot be read


class Limits(NamedTuple):
    """The lowest limits of all groups that the process is in; None if no group sets one."""

    memory_bytes: int | None
    cpus: float | None  # CPU seconds per second
    tasks: int | None  # processes and threads


def read_limits(root: Path = _ROOT) -> Limits:
    """Read the limits of this process. Blocks.

    `root` is the directory where proc and the control groups are mounted. A group that cannot be
    read sets no limit: some containers hide them.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text()
        mounts = parse_mountinfo((root / "proc/self/mountinfo").read_text(errors="surrogateescape"))
    except OSError:
        return Limits(None, None, None)
    memory: list[int] = []
    cpus: list[float] = []
    tasks: list[int] = []
    for controllers, group in _groups(groups):
        for directory in _directories(root, controllers, group, mounts):
            memory += _numbers(directory, "memory.max", "memory.high", "memory.limit_in_bytes")
            tasks += _numbers(directory, "pids.max")
            cpus += _cpus(directory)
    return Limits(min(memory, default=None), min(cpus, default=None), min(tasks, default=None))


def usable_cpus(root: Path = _ROOT) -> int:
    """Return how many CPUs this process can use: its affinity, or a lower CPU quota. Blocks."""
    allowed = len(os.sched_getaffinity(0))
    quota = read_limits(root).cpus
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def pid_max(root: Path = _ROOT) -> int:
    """Return how many process ids the kernel hands out, threads included. Blocks."""
    word = setting_of(root / "proc/sys/kernel/pid_max")
    return int(word) if word.isdigit() else _PID_MAX_DEFAULT


def _groups(text: str) -> Iterator[tuple[frozenset[str], PurePosixPath]]:
    """Yield each group of /proc/PID/cgroup with its controllers.

    The line of the version 2 group lists no controllers.
    """
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            yield frozenset(filter(None, controllers.split(","))), PurePosixPath(path)


def _directories(root: Path, controllers: frozenset[str], group: PurePosixPath, mounts: list[Mount]) -> Iterator[Path]:
    """Yield the directory of a group and those of its parents, as far up as they are mounted
    here.
    """
    for mount in mounts:
        if mount.type != ("cgroup" if controllers else "cgroup2") or not controllers <= mount.options:
            continue
        # In a container without a cgroup namespace the group has the host's path, and the mount
        # shows only a part of the host's tree.
        inside = group.relative_to(mount.root) if group.is_relative_to(mount.root) else PurePosixPath()
        top = root / mount.point.relative_to("/")
        yield from (top / path for path in (inside, *inside.parents) if ".." not in path.parts)
        return


def _numbers(directory: Path, *names: str) -> list[int]:
    """Return the limits in the files of a group.

    "max" means no limit; version 1 uses a number far above any host's memory.
    """
    words = [setting_of(directory / name) for name in names]
    return [int(word) for word in words if word.isdigit()]


def _cpus(directory: Path) -> list[float]:
    quota, _, period = setting_of(directory / "cpu.max").partition(" ")
    if not quota:
        quota, period = setting_of(directory / "cpu.cfs_quota_us"), setting_of(directory / "cpu.cfs_period_us")
    with contextlib.suppress(ValueError, ZeroDivisionError):
        if int(quota) > 0:
            return [int(quota) / int(period)]
    return []  # "max", -1, or no such file


def own_directories(root: Path = _ROOT) -> list[Path]:
    """Return this process's group of version 2 and the groups above it, as far as they are mounted.
    Blocks.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text()
        mounts = parse_mountinfo((root / "proc/self/mountinfo").read_text(errors="surrogateescape"))
    except OSError:
        return []
    return [
        directory
        for controllers, group in _groups(groups)
        if not controllers
        for directory in _directories(root, controllers, group, mounts)
    ]
