"""What the doctor concludes from what it read, and that it always answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
from pathlib import Path, PurePosixPath
from resource import RLIM_INFINITY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice import doctor
from coppice.doctor import memory, storage, system, virtualization
from coppice.doctor.mounts import Mount, mount_of, parse_mountinfo
from coppice.model import GIB, MIB, Check
from coppice.store.database import Database
from coppice.vmm.qemu import host

MOUNTINFO = r"""27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
22 27 0:21 / /proc rw,relatime - proc proc rw,hidepid=invisible
31 27 0:29 / /sys/fs/cgroup rw,nosuid shared:2 master:3 - cgroup2 cgroup2 rw,favordynmods
40 27 0:40 / /var/lib/my\040data rw - btrfs /dev/vdb rw
41 27 0:41 / /var/lib/my\040data ro - xfs /dev/vdc rw
a line of something else
"""


def mounts() -> list[Mount]:
    return parse_mountinfo(MOUNTINFO)


def test_mountinfo_is_read() -> None:
    """Types, options of both kinds and escaped names come out as the kernel meant them."""
    assert [mount.type for mount in mounts()] == ["ext4", "proc", "cgroup2", "btrfs", "xfs"]
    assert mounts()[3].point == PurePosixPath("/var/lib/my data")
    assert "favordynmods" in mounts()[2].options
    assert "nosuid" in mounts()[2].options


@given(st.text())
def test_any_mountinfo_is_read(text: str) -> None:
    """Lines that are not understood never stop a diagnosis."""
    parse_mountinfo(text)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/var/lib/my data/coppice", "xfs"),
        ("/var/lib/my data", "xfs"),
        ("/var/lib/my", "ext4"),
        ("/sys/fs/cgroup", "cgroup2"),
    ],
)
def test_a_path_belongs_to_its_deepest_last_mount(path: str, expected: str) -> None:
    """The data directory is judged by the file system that really holds it."""
    found = mount_of(PurePosixPath(path), mounts())
    assert found is not None
    assert found.type == expected


@pytest.mark.parametrize(
    ("virtual", "device", "status", "word"),
    [
        (True, "ok", "ok", "the CPU itself"),
        (True, "missing", "warn", "no /dev/kvm"),
        (True, "denied", "warn", "not for this user"),
        (True, "broken", "warn", "not what it should be"),
        (False, "missing", "warn", "TCG"),
        (False, "ok", "warn", "may hang"),
    ],
)
def test_kvm(virtual: bool, device: host.KvmDevice, status: str, word: str) -> None:
    """KVM counts only with the CPU's own help; without it guests are emulated, which is no failure."""
    check = virtualization.judge_kvm(virtual, device)
    assert check.status == status
    assert word in check.detail
    assert bool(check.cure) == (status != "ok")


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "ok"),
        ("10.0.0", "ok"),
        ("6.2.0 (Debian 1:6.2)", "warn"),
        ("unknown", "warn"),
    ],
)
def test_qemu_version(version: str, status: str) -> None:
    """Versions compare as numbers: 10 is newer than 7.2."""
    assert virtualization.judge_qemu(version).status == status


@pytest.mark.parametrize(
    ("virtual", "value", "affected", "status"),
    [
        (False, "N", False, "ok"),
        (True, "", False, "ok"),
        (True, "never", False, "ok"),
        (True, "Y", True, "ok"),
        (True, "N", False, "warn"),
    ],
)
def test_nx_huge_pages(virtual: bool, value: str, affected: bool, status: str) -> None:
    """Nobody is told to switch off a protection that the CPU needs."""
    assert virtualization.judge_nx_huge_pages(virtual, value, affected=affected).status == status


@pytest.mark.parametrize(
    ("type_", "options", "writable", "status"),
    [
        ("ext4", "rw", True, "ok"),
        ("btrfs", "rw", True, "ok"),
        ("tmpfs", "rw", True, "warn"),
        ("nfs4", "rw", True, "warn"),
        ("fuse.other", "rw", True, "warn"),
        ("xfs", "ro", True, "fail"),
        ("xfs", "rw", False, "fail"),
    ],
)
def test_file_system(type_: str, options: str, writable: bool, status: str) -> None:
    """A data directory that forgets, is far away, or cannot be written is pointed out."""
    mount = Mount(PurePosixPath("/data"), type_, frozenset({options}))
    assert storage.judge_file_system("/data/coppice", mount, writable=writable).status == status


@pytest.mark.parametrize(("free", "status"), [(1 * GIB, "fail"), (5 * GIB, "warn"), (50 * GIB, "ok")])
def test_free_space(free: int, status: str) -> None:
    """A disk that is nearly full is told before a capture fails on it."""
    assert storage.judge_free_space(free).status == status


@pytest.mark.parametrize(("free", "status"), [(100 * MIB, "fail"), (1 * GIB, "warn"), (16 * GIB, "ok")])
def test_memory(free: int, status: str) -> None:
    """Too little memory for a guest is a failure."""
    assert memory.judge_available(free).status == status


def test_meminfo_is_in_bytes() -> None:
    """The kernel's kB are KiB; a key that is the beginning of another is not mixed up with it."""
    text = "MemTotal:       24684084 kB\nMemAvailableX:        1 kB\nMemAvailable:   23000000 kB\n"
    assert memory.meminfo_bytes(text, "MemAvailable") == 23000000 * 1024
    assert memory.meminfo_bytes(text, "Mem") == 0


def test_sysctls() -> None:
    """Strict overcommit makes forks fail; few mappings may end a VM; absent settings are no finding."""
    assert memory.judge_overcommit(2).status == "fail"
    assert {memory.judge_overcommit(value).status for value in (0, 1, None)} == {"ok"}
    assert memory.judge_max_map_count(1000).status == "warn"
    assert {memory.judge_max_map_count(value).status for value in (65530, 262144, None)} == {"ok"}


def test_pagemap_scan() -> None:
    """An old kernel only makes captures slower; another errno is shown as it is."""
    assert memory.judge_pagemap_scan(None).status == "ok"
    assert "6.7" in memory.judge_pagemap_scan(errno.ENOTTY).detail
    assert "not permitted" in memory.judge_pagemap_scan(errno.EPERM).detail


@pytest.mark.parametrize(
    ("scope", "root", "status"),
    [(None, False, "ok"), (0, False, "ok"), (1, False, "warn"), (1, True, "ok"), (2, True, "ok"), (3, True, "warn")],
)
def test_ptrace(scope: int | None, root: bool, status: str) -> None:
    """Where the kernel will not let a fork be captured, that is known before."""
    assert memory.judge_ptrace(scope, root=root, capable=root).status == status


def test_root_of_a_container_is_told_what_it_lacks() -> None:
    """Without CAP_SYS_PTRACE root can start nothing; a user needs no such thing for processes of their own."""
    check = memory.judge_ptrace(0, root=True, capable=False)
    assert check.status == "fail"
    assert "SYS_PTRACE" in check.cure


def test_smaps() -> None:
    """A /proc that hides processes is a finding for a user, and none for root."""
    assert memory.judge_smaps(mounts(), root=False).status == "warn"
    assert memory.judge_smaps(mounts(), root=True).status == "ok"
    assert memory.judge_smaps([mounts()[0]], root=False).status == "ok"


def test_limits() -> None:
    """Low limits are told with what raises them; those that do not bind root are no finding for root."""
    assert system.judge_open_files(1024, 524288).status == "warn"
    assert "65536" in system.judge_open_files(1024, 524288).cure
    assert "ulimit -n 2048" in system.judge_open_files(1024, 2048).cure
    assert system.judge_open_files(RLIM_INFINITY, RLIM_INFINITY).status == "ok"
    assert system.judge_processes(1000, root=False).status == "warn"
    assert system.judge_processes(1000, root=True).status == "ok"
    assert system.judge_locked_memory(64 << 10, root=False).status == "warn"
    assert system.judge_locked_memory(64 << 10, root=True).status == "ok"
    assert system.judge_mount_count(20).status == "ok"
    assert system.judge_mount_count(5000).status == "warn"


def test_favordynmods() -> None:
    """Only a host that runs KVM guests in cgroup2 is told to remount."""
    plain = [mount._replace(options=frozenset({"rw"})) for mount in mounts()]
    assert system.judge_favordynmods(plain, virtual=True).status == "warn"
    assert "/sys/fs/cgroup" in system.judge_favordynmods(plain, virtual=True).cure
    assert system.judge_favordynmods(mounts(), virtual=True).status == "ok"
    assert system.judge_favordynmods(plain, virtual=False).status == "ok"
    assert system.judge_favordynmods([], virtual=True).status == "ok"


@pytest.mark.parametrize(
    ("root", "most", "unprivileged", "restricted", "cure"),
    [
        (True, 0, 0, 1, ""),
        (False, 1000, None, None, ""),
        (False, 1000, 1, 0, ""),
        (False, 0, None, None, "max_user_namespaces"),
        (False, 1000, 0, None, "unprivileged_userns_clone"),
        (False, 1000, None, 1, "apparmor"),
    ],
)
def test_user_namespaces(root: bool, most: int, unprivileged: int | None, restricted: int | None, cure: str) -> None:
    """The one setting that forbids it is the one that is named."""
    for qemu, status in ((True, "warn"), (False, "fail")):  # QEMU before 8.2 does not run without
        check = system.judge_user_namespaces(
            root=root, qemu=qemu, most=most, unprivileged=unprivileged, restricted=restricted
        )
        assert (cure in check.cure) if cure else not check.cure
        assert check.status == (status if cure else "ok")


def test_every_program_that_is_run_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says `run coppice doctor` must find its program there, with the package that brings it; without some, nothing runs."""
    monkeypatch.setattr(system, "_SEARCH_PATH", str(tmp_path))
    checks = {name: check() for name, check in system.tools()}
    assert {"prlimit", "unshare", "mke2fs", "e2fsck", "apt-get", "dpkg-deb", "mmdebstrap"} <= set(checks)
    assert "sqfstar" not in checks  # no command makes a squashfs image: to miss it is no finding
    assert [name for name, check in checks.items() if check.status == "fail"] == ["mke2fs", "prlimit"]
    assert all(check.status != "ok" and (check.cure or "").startswith("apt-get install") for check in checks.values())


async def test_every_check_answers_on_this_machine(tmp_path: Path) -> None:
    """All checks run for real, each finding has its cure, and a data directory that is not there yet is not made."""
    home = tmp_path / "not" / "there"
    checks = await doctor.run_checks(home)
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.cure for check in checks if check.status != "ok")
    assert all("could not be checked" not in check.detail for check in checks)
    assert list(tmp_path.iterdir()) == []


async def test_a_check_that_cannot_be_made_is_a_warning_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One reading that fails, or hangs, does not take the others with it, and says what to do."""

    async def hangs() -> Check:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    async def fails() -> Check:
        raise OSError("no such luck")

    monkeypatch.setattr(doctor, "_DEADLINE_S", 0.05)
    monkeypatch.setattr(virtualization, "qemu", hangs)
    monkeypatch.setattr(system, "user_namespaces", fails)
    checks = {check.name: check for check in await doctor.run_checks(tmp_path)}
    assert len(checks) > 10
    for name, said in (("qemu", "no answer"), ("user namespaces", "no such luck")):
        assert checks[name].status == "warn"
        assert said in checks[name].detail
        assert checks[name].cure


def test_a_database_that_no_command_can_open_is_found(tmp_path: Path) -> None:
    """Each such error sends people to doctor, which must not call all well."""
    assert storage.database(tmp_path).status == "ok"
    Database(tmp_path / "coppice.db").close()
    assert storage.database(tmp_path).status == "ok"
    with contextlib.closing(sqlite3.connect(tmp_path / "coppice.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    newer = storage.database(tmp_path)
    assert (newer.status, "99" in newer.detail, "newer" in newer.cure) == ("fail", True, True)
    (tmp_path / "coppice.db").write_bytes(b"nothing that SQLite ever wrote\n" * 1000)
    assert storage.database(tmp_path).status == "fail"


async def test_a_failing_check_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reading that fails is one warning among the other lines."""

    def unreadable() -> Check:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(memory, "available", unreadable)
    checks = {check.name: check for check in await doctor.run_checks(tmp_path)}
    assert checks["memory"].status == "warn"
    assert "Permission denied" in checks["memory"].detail
    assert checks["hard links"].status == "ok"
