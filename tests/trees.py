"""A directory that looks like a tree of control groups of version 2, and the parts of proc that lead
to it.
"""

from __future__ import annotations

from pathlib import Path

CONTROLLERS = "cpu io memory pids"


def make_tree(root: Path, own: str) -> Path:
    """Make a tree in which this process is in the group `own`; return its topmost group."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(f"0::{own}\n")
    line = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
    (root / "proc/self/mountinfo").write_text(line)
    top = root / "sys/fs/cgroup"
    inside = Path(own).relative_to("/")
    for directory in (top / path for path in (inside, *inside.parents)):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.controllers").write_text(CONTROLLERS)
        for name in ("cgroup.subtree_control", "cgroup.procs"):
            (directory / name).touch()
    return top
