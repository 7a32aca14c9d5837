"""Limits of control groups: the process's group and its ancestors, in both versions, in containers
and under systemd.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coppice.linux.cgroups import Limits, pid_max, read_limits, usable_cpus
from coppice.model import GIB
from coppice.state import budgets

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 31 0:31 {root} /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
)


def host(root: Path, groups: str, mounts: str) -> Path:
    """Make a host as /proc shows it to the process."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts)
    return root


def write(root: Path, files: dict[str, str]) -> None:
    """Write files of control groups, by their paths below /sys/fs/cgroup."""
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


SERVICE = "system.slice/agents.service"


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({f"{SERVICE}/memory.max": str(4 * GIB)}, Limits(4 * GIB, None, None)),  # MemoryMax=4G
        ({f"{SERVICE}/memory.max": "max", f"{SERVICE}/memory.high": str(GIB)}, Limits(GIB, None, None)),
        ({f"{SERVICE}/memory.max": str(4 * GIB), "system.slice/memory.max": str(GIB)}, Limits(GIB, None, None)),
        ({f"{SERVICE}/memory.max": str(GIB), "system.slice/memory.max": "max"}, Limits(GIB, None, None)),
        ({"memory.max": str(2 * GIB)}, Limits(2 * GIB, None, None)),  # a container: the root is its own group
        ({f"{SERVICE}/cpu.max": "150000 100000", "system.slice/cpu.max": "max 100000"}, Limits(None, 1.5, None)),
        ({f"{SERVICE}/pids.max": "800", "system.slice/pids.max": "max"}, Limits(None, None, 800)),
        ({f"{SERVICE}/memory.max": "garbage", f"{SERVICE}/cpu.max": "1 0"}, Limits(None, None, None)),
        ({"user.slice/memory.max": "1"}, Limits(None, None, None)),  # another slice's
        ({}, Limits(None, None, None)),
    ],
)
def test_version_2_uses_the_lowest_limit_up_to_the_root(tmp_path: Path, files: dict[str, str], limits: Limits) -> None:
    """The lowest limit from the process's own group up to the root applies."""
    write(host(tmp_path, f"0::/{SERVICE}\n", V2), files)
    assert read_limits(tmp_path) == limits


@pytest.mark.parametrize(
    ("root", "group", "inside"),
    [
        ("/", "/docker/abc", "docker/abc/"),  # on the host
        ("/docker/abc", "/docker/abc", ""),  # in the container: the mount shows its part of the tree
        ("/docker/abc", "/docker/abc/inner", "inner/"),
        ("/", "/", ""),  # in a cgroup namespace
        ("/docker/abc", "/elsewhere", ""),  # in a namespace outside the mount's tree
    ],
)
def test_version_1_reads_a_tree_for_each_controller(tmp_path: Path, root: str, group: str, inside: str) -> None:
    """Each controller has a tree of its own."""
    groups = f"4:pids:{group}\n3:memory:{group}\n2:cpu,cpuacct:{group}\n1:name=systemd:{group}\n0::/\n"
    host(tmp_path, groups, V1.format(root=root))
    write(
        tmp_path,
        {
            f"memory/{inside}memory.limit_in_bytes": str(GIB),
            f"cpu,cpuacct/{inside}cpu.cfs_quota_us": "50000",
            f"cpu,cpuacct/{inside}cpu.cfs_period_us": "100000",
            f"pids/{inside}pids.max": "99",
        },
    )
    assert read_limits(tmp_path) == Limits(GIB, 0.5, 99)


def test_version_1_without_a_limit_has_none(tmp_path: Path) -> None:
    """Without a limit, version 1 shows nearly 2 to the 63rd bytes and a quota of -1."""
    host(tmp_path, "3:memory:/\n2:cpu,cpuacct:/\n", V1.format(root="/"))
    write(
        tmp_path,
        {
            "memory/memory.limit_in_bytes": str(0x7FFFFFFFFFFFF000),
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    limits = read_limits(tmp_path)
    assert limits.cpus is None
    assert limits.memory_bytes is None or limits.memory_bytes > 1 << 60


def test_a_host_that_hides_the_groups_has_no_limits(tmp_path: Path) -> None:
    """Limits are unknown in a jail without /proc or without the mount."""
    assert read_limits(tmp_path) == Limits(None, None, None)
    assert pid_max(tmp_path) > 1000
    host(tmp_path, "0::/a/../../b\n", "")
    assert read_limits(tmp_path) == Limits(None, None, None)


@pytest.mark.parametrize(("quota", "cpus"), [("50000 100000", 1), ("150000 100000", 2), ("max 100000", 1 << 20)])
def test_usable_cpus_are_those_the_process_may_use(tmp_path: Path, quota: str, cpus: int) -> None:
    """The count is no more than the process may run on, and at least one."""
    write(host(tmp_path, "0::/\n", V2), {"cpu.max": quota})
    assert usable_cpus(tmp_path) == min(cpus, len(os.sched_getaffinity(0)))


def test_the_default_budgets_are_within_the_group_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under systemd's MemoryMax=1G and TasksMax=80, ten VMMs together may use 90 % of a GiB,
    whatever the host has.
    """
    monkeypatch.setattr(budgets, "read_limits", lambda: Limits(GIB, None, 80))
    found = budgets.default_budgets(tmp_path)
    assert (found.memory_bytes, found.max_instances) == (int(GIB * 0.9), 10)
    monkeypatch.setattr(budgets, "read_limits", lambda: Limits(None, None, 3))
    assert budgets.default_budgets(tmp_path).max_instances == 1
