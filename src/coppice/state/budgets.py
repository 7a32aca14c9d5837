"""Resource limits of a data directory, from the environment, config.toml, or the host's size.

[budgets]
max_instances = 1000          # COPPICE_MAX_INSTANCES
memory = "24G"                # COPPICE_MEMORY_BUDGET
memory_overcommit = 16        # COPPICE_MEMORY_OVERCOMMIT
disk_floor = "10G"            # COPPICE_DISK_FLOOR
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from coppice.linux.cgroups import pid_max, read_limits
from coppice.model import GIB, Budgets, BudgetUse
from coppice.state.load import Load
from coppice.state.settings import asked_budgets

_OVERCOMMIT = 16.0  # a fork of a warm 512 MiB guest has a few MiB of its own; this allows 32
_MEMORY_SHARE = 0.9
_DISK_SHARE = 0.05
_MOST_DISK_FLOOR = 1 * GIB
_TASKS_PER_VMM = 8  # threads, each of which takes a process id


def load_budgets(home: Path, disk: Path | None = None, environ: Mapping[str, str] = os.environ) -> Budgets:
    """Return the budgets of a data directory. Blocks.

    `disk` is a directory on the same file system, for a data directory that does not exist yet.

    :raises UsageError: config.toml or a variable is invalid; the message says which
    """
    return with_defaults(asked_budgets(home, environ), disk or home)


def with_defaults(asked: Mapping[str, float], directory: Path) -> Budgets:
    """Return the budgets that the user has asked for, and the host's for the rest. Blocks."""
    return msgspec.structs.replace(default_budgets(directory), **asked)


def default_budgets(directory: Path) -> Budgets:
    """Return what the host and its control groups allow.

    The budget is 90 % of the memory, one VMM per 8 allowed tasks, and 5 % or 1 GiB of free disk.
    """
    limits = read_limits()
    memory = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), limits.memory_bytes or sys.maxsize)
    tasks = min(pid_max(), limits.tasks or sys.maxsize)
    disk = os.statvfs(directory)
    return Budgets(
        max_instances=max(1, tasks // _TASKS_PER_VMM),
        memory_bytes=int(memory * _MEMORY_SHARE),
        memory_overcommit=_OVERCOMMIT,
        disk_floor_bytes=min(_MOST_DISK_FLOOR, int(disk.f_blocks * disk.f_frsize * _DISK_SHARE)),
    )


def worst_case(budgets: Budgets, ram_bytes: int, vmm_bytes: int) -> int:
    """Return the bytes of memory to reserve for machines with so much RAM in total, and their VMMs.

    Forks share most of their RAM, and nothing of their VMMs.
    """
    return int(ram_bytes / budgets.memory_overcommit) + vmm_bytes


def use_of(budgets: Budgets, load: Load, disk_free_bytes: int) -> BudgetUse:
    """Return the budgets next to the recorded use and the free disk space."""
    return BudgetUse(
        instances=load.instances,
        max_instances=budgets.max_instances,
        running=load.running,
        memory_bytes=worst_case(budgets, load.ram_bytes, load.vmm_bytes),
        memory_limit_bytes=budgets.memory_bytes,
        memory_overcommit=budgets.memory_overcommit,
        disk_free_bytes=disk_free_bytes,
        disk_floor_bytes=budgets.disk_floor_bytes,
    )
