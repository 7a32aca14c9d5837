"""The limits of an instance's VMM: a control group for each run of an instance that has limits.

A link in the instance's directory names the group. It is made before the group, and removed after
it, so a killed process leaves no group that nothing names. All functions block.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from coppice.linux import cgroup_tree
from coppice.linux.files import os_errors
from coppice.model import MIB, Instance, Limits, Usage

LINK: Final = "cgroup"
ROOT = Path("/")  # where proc and the control groups are mounted
_PERIOD_US: Final = 100_000


def check(limits: Limits, directory: Path) -> None:
    """Refuse limits that this host cannot enforce. `directory` is on the instance's disk.

    :raises HostCannot: the message has the reason
    """
    if settings := _settings(limits, directory):
        cgroup_tree.delegated(_controllers(settings), ROOT)


def prepare(instance: Instance, directory: Path) -> Path | None:
    """Make the control group for the next VMM of an instance; None if it has no limits.

    :raises HostCannot: this host cannot enforce them; the message has the reason
    """
    release(directory)
    settings = _settings(instance.limits, directory)
    if not settings:
        return None
    parent = cgroup_tree.delegated(_controllers(settings), ROOT)
    group = parent / f"{cgroup_tree.PREFIX}{instance.id}"
    with os_errors("name the control group"):
        (directory / LINK).symlink_to(group)
    cgroup_tree.create(group, settings)
    return group


def release(directory: Path) -> None:
    """Remove the control group of an instance whose VMM has ended. Idempotent.

    :raises HostCannot: the kernel refuses
    """
    if (group := group_of(directory)) is not None:
        cgroup_tree.remove(group)
        with os_errors("forget the control group"):
            (directory / LINK).unlink(missing_ok=True)


def group_of(directory: Path) -> Path | None:
    """Return the control group that an instance's directory names; None if it names none."""
    try:
        group = Path(os.readlink(f"{directory}/{LINK}"))  # noqa: PTH115 - a fork does this, and has none
    except OSError:
        return None
    return group if group.name == f"{cgroup_tree.PREFIX}{directory.name}" else None


def usage(directory: Path) -> Usage | None:
    """Return what a running VMM has used of its limits; None if it has none."""
    group = group_of(directory)
    if group is None or not group.is_dir():
        return None
    return Usage(
        memory_bytes=cgroup_tree.numbers(group, "memory.current").get("", 0),
        cpu_s=cgroup_tree.numbers(group, "cpu.stat").get("usage_usec", 0) / 1_000_000,
        tasks=cgroup_tree.numbers(group, "pids.current").get("", 0),
        oom_kills=cgroup_tree.numbers(group, "memory.events").get("oom_kill", 0),
    )


def exceeded(instance: Instance, directory: Path) -> str:
    """Return why the kernel ended an instance's VMM; "" if it exceeded no limit."""
    found = usage(directory)
    if found is None or not found.oom_kills or instance.limits.memory_bytes is None:
        return ""
    return f"the kernel ended the VMM: it exceeded its memory limit of {instance.limits.memory_bytes // MIB} MiB"


def _settings(limits: Limits, directory: Path) -> dict[str, str]:
    settings: dict[str, str] = {}
    if limits.memory_bytes is not None:
        settings["memory.max"] = str(limits.memory_bytes)
    if limits.cpus is not None:
        settings["cpu.max"] = f"{round(limits.cpus * _PERIOD_US)} {_PERIOD_US}"
    if limits.pids is not None:
        settings["pids.max"] = str(limits.pids)
    if limits.io_bytes_per_s is not None:
        rate = limits.io_bytes_per_s
        settings["io.max"] = f"{cgroup_tree.device_of(directory, ROOT)} rbps={rate} wbps={rate}"
    return settings


def _controllers(settings: dict[str, str]) -> set[str]:
    return {name.partition(".")[0] for name in settings}
