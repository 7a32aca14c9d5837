"""Control groups for VMMs: where they can be made, and that none is left. The tree is a directory
that looks like one, but for the tests of a real one.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from coppice.errors import HostCannot
from coppice.linux import cgroup_tree
from coppice.linux.mounts import read_mounts
from coppice.vmm.process import is_alive
from coppice.vmm.starting import Rights, spawn
from trees import make_tree


def test_the_topmost_group_that_can_be_used_is_chosen(tmp_path: Path) -> None:
    """Root gets the topmost group. It passes on what is asked for, and nothing else."""
    top = make_tree(tmp_path, "/user.slice/session.scope")
    assert cgroup_tree.delegated({"memory", "cpu"}, tmp_path) == top
    assert set((top / "cgroup.subtree_control").read_text().split()) == {"+cpu", "+memory"}
    (top / "cgroup.subtree_control").write_text("memory pids")
    assert cgroup_tree.delegated({"memory"}, tmp_path) == top
    assert (top / "cgroup.subtree_control").read_text() == "memory pids"


def test_a_user_gets_the_group_that_was_delegated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups above it belong to root."""
    top = make_tree(tmp_path, "/user.slice/user@7.service/app.slice/coppice.scope")
    real = os.access
    own = top / "user.slice/user@7.service"

    def access(path: Path, mode: int) -> bool:
        return Path(path).is_relative_to(own) and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    assert cgroup_tree.delegated({"memory"}, tmp_path) == own
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(HostCannot, match="may write to none") as refused:
        cgroup_tree.delegated({"memory"}, tmp_path)
    assert "Delegate=yes" in (refused.value.hint or "")


def test_the_refusal_has_the_reason(tmp_path: Path) -> None:
    """No tree, no controller: the message names what the host lacks."""
    with pytest.raises(HostCannot, match="no control groups of version 2"):
        cgroup_tree.delegated({"memory"}, tmp_path)
    top = make_tree(tmp_path, "/")
    (top / "cgroup.controllers").write_text("cpu pids")
    with pytest.raises(HostCannot, match="no controller memory"):
        cgroup_tree.delegated({"memory", "cpu"}, tmp_path)


def test_a_group_is_made_with_its_settings_or_not_at_all(tmp_path: Path) -> None:
    """A setting that the kernel refuses leaves no group."""
    with pytest.raises(HostCannot, match=r"io\.max|No such file"):
        cgroup_tree.create(tmp_path / "coppice-x", {"io.max": "8:0 rbps=1"})
    assert not (tmp_path / "coppice-x").exists()
    cgroup_tree.remove(tmp_path / "coppice-x")


def test_numbers_of_a_group(tmp_path: Path) -> None:
    """Files of one number, of keys, and files that are missing."""
    (tmp_path / "memory.current").write_text("4096\n")
    (tmp_path / "memory.events").write_text("low 0\noom_kill 2\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_tree.numbers(tmp_path, "memory.current") == {"": 4096}
    assert cgroup_tree.numbers(tmp_path, "memory.events") == {"low": 0, "oom_kill": 2}
    assert cgroup_tree.numbers(tmp_path, "memory.max") == cgroup_tree.numbers(tmp_path, "none") == {}


def test_the_disk_of_a_directory(tmp_path: Path) -> None:
    """The kernel limits disks, not partitions; a file system without a disk cannot be limited."""
    number = tmp_path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    with pytest.raises(HostCannot, match="without a disk"):
        cgroup_tree.device_of(tmp_path, tmp_path)
    disk = tmp_path / "sys/devices/disk"
    (disk / "part").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block" / name).symlink_to(disk / "part")
    assert cgroup_tree.device_of(tmp_path, tmp_path) == name
    (disk / "part/partition").write_text("1\n")
    assert cgroup_tree.device_of(tmp_path, tmp_path) == "8:0"


@pytest.fixture
def real_group() -> Path:
    """A group of this kernel's tree, whatever controllers it has; the test removes it."""
    points = [Path(mount.point) for mount in read_mounts() if mount.type == "cgroup2"]
    if not points or not os.access(points[0], os.W_OK):
        pytest.skip("this user may make no control group of version 2 here")
    return points[0] / f"coppice-test-{os.getpid()}"


async def test_a_process_starts_in_its_group_and_ends_with_it(real_group: Path, tmp_path: Path) -> None:
    """It is there from its first instruction on, also as another user, and the group can be removed
    with it: no process is left that nothing limits.
    """
    cgroup_tree.create(real_group, {})
    try:
        user = 0x41000000 - 9 if os.geteuid() == 0 else None
        rights = Rights(cgroup=real_group, user=user)
        process = spawn(["sleep", "1000"], cwd=tmp_path, log=tmp_path / "log", rights=rights)
        groups = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        assert f"0::/{real_group.name}" in groups
        assert (real_group / "cgroup.procs").read_text().split() == [str(process.pid)]
        assert f"0::/{real_group.name}" not in Path("/proc/self/cgroup").read_text().splitlines()
    finally:
        await asyncio.to_thread(cgroup_tree.remove, real_group)
    assert not is_alive(process)
    assert not real_group.exists()


async def test_the_kernel_ends_what_exceeds_its_memory(real_group: Path, tmp_path: Path) -> None:
    """The limit holds, and the group counts the kill."""
    try:
        parent = cgroup_tree.delegated({"memory", "pids"})
    except HostCannot as refused:
        pytest.skip(refused.message)
    own = parent / real_group.name
    cgroup_tree.create(own, {"memory.max": str(32 << 20), "pids.max": "16"})
    try:
        code = ["python3", "-c", "x = bytearray(256 << 20)"]
        process = spawn(code, cwd=tmp_path, log=tmp_path / "log", rights=Rights(cgroup=own))
        async with asyncio.timeout(60):
            while is_alive(process):  # noqa: ASYNC110 - a child that is reaped elsewhere has no event
                await asyncio.sleep(0.01)
        assert cgroup_tree.numbers(own, "memory.events")["oom_kill"] == 1
    finally:
        await asyncio.to_thread(cgroup_tree.remove, own)
