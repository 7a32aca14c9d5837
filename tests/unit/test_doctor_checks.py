"""The doctor draws the right conclusions from its readings, and always answers."""

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
from coppice.doctor import captures, memory, network, storage, system, virtualization
from coppice.linux.kvm import KvmDevice
from coppice.linux.mounts import Mount, mount_of, parse_mountinfo
from coppice.model import GIB, MIB, Check
from coppice.network.nat import surroundings
from coppice.state.database import Database
from coppice.vmm.registry import Drivers

MOUNTINFO = r"""27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
22 27 0:21 / /proc rw,relatime - proc proc rw,hidepid=invisible
31 27 0:29 / /sys/fs/cgroup rw,nosuid shared:2 master:3 - cgroup2 cgroup2 rw,favordynmods
40 27 0:40 / /var/lib/my\040data rw - btrfs /dev/vdb rw
41 27 0:41 / /var/lib/my\040data ro - xfs /dev/vdc rw
a line of something else
"""


def mounts() -> list[Mount]:
    return parse_mountinfo(MOUNTINFO)


def test_mountinfo_is_parsed() -> None:
    """File system types, both kinds of options and escaped names are parsed."""
    assert [mount.type for mount in mounts()] == ["ext4", "proc", "cgroup2", "btrfs", "xfs"]
    assert mounts()[3].point == PurePosixPath("/var/lib/my data")
    assert "favordynmods" in mounts()[2].options
    assert "nosuid" in mounts()[2].options


@given(st.text())
def test_any_mountinfo_is_parsed(text: str) -> None:
    """Lines that cannot be parsed never stop a diagnosis."""
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
    """The check judges the file system that actually holds the data directory."""
    found = mount_of(PurePosixPath(path), mounts())
    assert found is not None
    assert found.type == expected


@pytest.mark.parametrize(
    ("virtual", "device", "status", "word"),
    [
        (True, "ok", "ok", "the CPU itself"),
        (True, "missing", "warn", "no /dev/kvm"),
        (True, "denied", "warn", "this user may not open /dev/kvm"),
        (True, "broken", "warn", "/dev/kvm does not work as KVM"),
        (False, "missing", "warn", "TCG"),
        (False, "ok", "warn", "may hang"),
    ],
)
def test_kvm_needs_the_cpus_support(virtual: bool, device: KvmDevice, status: str, word: str) -> None:
    """KVM counts only with support of the CPU; without it guests are emulated, which is not a
    failure.
    """
    check = virtualization.judge_kvm(virtual, device)
    assert check.status == status
    assert word in check.detail
    assert bool(check.cure) == (status != "ok")


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "ok"),
        ("10.0.0", "ok"),
        ("11.1.3 (Debian 1:11.1.3+ds-1)", "ok"),
        ("11.2.0", "warn"),
        ("6.2.0 (Debian 1:6.2)", "warn"),
        ("unknown", "warn"),
    ],
)
def test_qemu_versions_are_compared_as_numbers(version: str, status: str) -> None:
    """Versions are compared as numbers: 10 is newer than 7.2. An untested newer release may refuse
    options that were deprecated before.
    """
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
def test_nx_huge_pages_stay_on_if_the_cpu_needs_them(virtual: bool, value: str, affected: bool, status: str) -> None:
    """The doctor never advises switching off a protection that the CPU needs."""
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
def test_an_unsuitable_file_system_is_reported(type_: str, options: str, writable: bool, status: str) -> None:
    """A data directory in memory, on a network or without write access is reported."""
    mount = Mount(PurePosixPath("/data"), type_, frozenset({options}))
    assert storage.judge_file_system("/data/coppice", mount, writable=writable).status == status


@pytest.mark.parametrize(("free", "status"), [(1 * GIB, "fail"), (5 * GIB, "warn"), (50 * GIB, "ok")])
def test_low_free_space_is_reported(free: int, status: str) -> None:
    """A nearly full disk is reported before a capture fails on it."""
    assert storage.judge_free_space(free).status == status


@pytest.mark.parametrize(("free", "status"), [(100 * MIB, "fail"), (1 * GIB, "warn"), (16 * GIB, "ok")])
def test_low_memory_is_reported(free: int, status: str) -> None:
    """Too little memory for a guest is a failure."""
    assert memory.judge_available(free).status == status


def test_meminfo_is_in_bytes() -> None:
    """The kernel's kB are KiB, and a key that is a prefix of another key does not match it."""
    text = "MemTotal:       24684084 kB\nMemAvailableX:        1 kB\nMemAvailable:   23000000 kB\n"
    assert memory.meminfo_bytes(text, "MemAvailable") == 23000000 * 1024
    assert memory.meminfo_bytes(text, "Mem") == 0


def test_sysctls_are_judged() -> None:
    """Strict overcommit makes forks fail, and too few mappings may end a VM; an absent setting is
    fine.
    """
    assert memory.judge_overcommit(2).status == "fail"
    assert {memory.judge_overcommit(value).status for value in (0, 1, None)} == {"ok"}
    assert memory.judge_max_map_count(1000).status == "warn"
    assert {memory.judge_max_map_count(value).status for value in (65530, 262144, None)} == {"ok"}


def test_pagemap_scan_is_judged() -> None:
    """An old kernel only slows captures down; any other errno is shown."""
    assert memory.judge_pagemap_scan(None).status == "ok"
    assert "6.7" in memory.judge_pagemap_scan(errno.ENOTTY).detail
    assert "not permitted" in memory.judge_pagemap_scan(errno.EPERM).detail


@pytest.mark.parametrize(
    ("scope", "root", "status"),
    [(None, False, "ok"), (0, False, "ok"), (1, False, "warn"), (1, True, "ok"), (2, True, "ok"), (3, True, "warn")],
)
def test_ptrace_restrictions_are_reported(scope: int | None, root: bool, status: str) -> None:
    """A kernel that would not let a fork be captured is reported in advance."""
    assert memory.judge_ptrace(scope, root=root, capable=root).status == status


def test_root_without_the_ptrace_capability_is_a_failure() -> None:
    """Root without CAP_SYS_PTRACE cannot start anything; a user does not need it for their own
    processes.
    """
    check = memory.judge_ptrace(0, root=True, capable=False)
    assert check.status == "fail"
    assert "SYS_PTRACE" in check.cure


def test_hidden_processes_are_reported() -> None:
    """A /proc that hides processes is a finding for a user, but not for root."""
    assert memory.judge_smaps(mounts(), root=False).status == "warn"
    assert memory.judge_smaps(mounts(), root=True).status == "ok"
    assert memory.judge_smaps([mounts()[0]], root=False).status == "ok"


def test_low_limits_are_reported() -> None:
    """A low limit is reported with its remedy; a limit that does not bind root is no finding for
    root.
    """
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


def test_favordynmods_is_advised_only_on_kvm_hosts() -> None:
    """Only a host that runs KVM guests in cgroup2 is advised to remount."""
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
def test_a_setting_that_forbids_user_namespaces_is_named(
    root: bool, most: int, unprivileged: int | None, restricted: int | None, cure: str
) -> None:
    """The check names the one setting that forbids user namespaces."""
    for qemu, status in ((True, "warn"), (False, "fail")):  # QEMU before 8.2 needs user namespaces
        check = system.judge_user_namespaces(
            root=root, qemu=qemu, most=most, unprivileged=unprivileged, restricted=restricted
        )
        assert (cure in check.cure) if cure else not check.cure
        assert check.status == (status if cure else "ok")


def test_every_external_program_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors refer users to the doctor, so it must check every program, and name its package.
    Nothing runs without some of them.
    """
    monkeypatch.setattr(system, "_SEARCH_PATH", str(tmp_path))
    checks = {name: check() for name, check in system.tools()}
    assert {"prlimit", "mke2fs", "e2fsck", "apt-get", "dpkg-deb", "mmdebstrap"} <= set(checks)
    assert [name for name, check in checks.items() if check.status == "fail"] == ["mke2fs", "prlimit", "setpriv"]
    assert all(check.status != "ok" and (check.cure or "").startswith("apt-get install") for check in checks.values())


async def test_every_check_answers_on_this_machine(tmp_path: Path) -> None:
    """All real checks answer, each finding has a remedy, and a missing data directory is not made."""
    home = tmp_path / "not" / "there"
    checks = await doctor.run_checks(home, Drivers())
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.cure for check in checks if check.status != "ok")
    assert all("could not be checked" not in check.detail for check in checks)
    assert list(tmp_path.iterdir()) == []


async def test_a_failed_check_is_a_warning_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One reading that fails or hangs does not stop the others, and its warning gives a remedy."""

    async def hangs() -> Check:
        await asyncio.sleep(60)
        raise AssertionError("the check should have timed out")

    async def fails() -> Check:
        raise OSError("no such luck")

    monkeypatch.setattr(doctor, "_DEADLINE_S", 0.05)
    monkeypatch.setattr(virtualization, "qemu", hangs)
    monkeypatch.setattr(system, "user_namespaces", fails)
    checks = {check.name: check for check in await doctor.run_checks(tmp_path, Drivers())}
    assert len(checks) > 10
    for name, said in (("qemu", "no answer"), ("user namespaces", "no such luck")):
        assert checks[name].status == "warn"
        assert said in checks[name].detail
        assert checks[name].cure


def test_a_database_that_no_command_can_open_is_found(tmp_path: Path) -> None:
    """Errors from an unusable database refer users to the doctor, so it must not report that all is
    well.
    """
    assert storage.database(tmp_path).status == "ok"
    Database(tmp_path / "coppice.db").close()
    assert storage.database(tmp_path).status == "ok"
    with contextlib.closing(sqlite3.connect(tmp_path / "coppice.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    newer = storage.database(tmp_path)
    assert (newer.status, "99" in newer.detail, "newer" in newer.cure) == ("fail", True, True)
    (tmp_path / "coppice.db").write_bytes(b"nothing that SQLite ever wrote\n" * 1000)
    damaged = storage.database(tmp_path)
    assert (damaged.status, "backup" in damaged.cure) == ("fail", True)


def test_a_database_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    """As on a read-only file system: to replace it by a backup would lose its records."""
    Database(tmp_path / "coppice.db").close()
    (tmp_path / "coppice.db-wal").mkdir()
    unopened = storage.database(tmp_path)
    assert (unopened.status, "backup" in unopened.cure, "read-only" in unopened.cure) == ("fail", False, True)


async def test_a_failing_check_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failed reading is one warning among the other lines."""

    def unreadable() -> Check:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(memory, "available", unreadable)
    checks = {check.name: check for check in await doctor.run_checks(tmp_path, Drivers())}
    assert checks["memory"].status == "warn"
    assert "Permission denied" in checks["memory"].detail
    assert checks["hard links"].status == "ok"


POLICY = """qemu-system-x86:
  Installed: 1:7.2+dfsg-7+deb12u17
  Candidate: {}
  Version table:
     1:7.2+dfsg-7+deb12u18 500
"""
CURRENT, NEXT = "1:7.2+dfsg-7+deb12u17", "1:7.2+dfsg-7+deb12u18"


@pytest.mark.parametrize(
    ("count", "policy", "held", "status", "word"),
    [
        (3, POLICY.format(NEXT), False, "warn", "about to replace"),
        (3, POLICY.format(NEXT), True, "ok", "is held"),
        (3, POLICY.format(CURRENT), False, "ok", "the latest"),
        (3, "", False, "ok", "no package manager"),
        (3, "N: Unable to locate package", False, "ok", "no package manager"),
        (0, POLICY.format(NEXT), False, "ok", "no capture depends"),
    ],
)
def test_a_pending_update_is_a_warning_if_there_are_captures(
    count: int, policy: str, held: bool, status: str, word: str
) -> None:
    """An owner of captures is warned before apt makes them unusable, and learns how to hold the
    package; without captures there is no warning.
    """
    found = captures.parse_policy("qemu-system-x86", policy, held=held) if count else None
    check = captures.judge_update(count, found)
    assert check.status == status
    assert word in check.detail
    assert (check.cure == "apt-mark hold qemu-system-x86") is (status == "warn")


def test_a_long_list_of_unusable_captures_is_shortened() -> None:
    """The list stays readable."""
    check = captures.judge_loadable(9, {f"vm-{number}": "vmm version was 1, is 2" for number in range(8)})
    assert (
        check.detail
        == "8 of 9 cannot be loaded here: vm-0, vm-1, vm-2, vm-3, vm-4 and others (vmm version was 1, is 2)"
    )


async def test_the_package_of_a_program_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real dpkg and apt find it; a program of no package, or a missing one, has none."""
    found = await captures._pending("sh")
    assert found is not None
    assert found.package == "dash"
    assert found.installed
    (tmp_path / "own").write_text("#!/bin/sh\n")
    (tmp_path / "own").chmod(0o755)
    assert await captures._pending(str(tmp_path / "own")) is None
    assert await captures._pending("no-such-program") is None


def test_the_needs_of_network_slots_are_checked() -> None:
    """Missing rights, and a firewall that would drop the slots' traffic, are reported, each with a
    remedy.
    """
    assert network.judge_slots("").status == "ok"
    assert "apt-get" in network.judge_slots("libnftables is not installed").cure
    assert "root" in network.judge_slots("this process has no CAP_NET_ADMIN").cure
    docker = {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}}
    ours = {"chain": {"family": "inet", "table": "coppice_1", "name": "forward", "hook": "forward", "policy": "accept"}}
    assert network.judge_forwarding(on=True, listed=[{"metainfo": {}}, ours]).status == "ok"
    found = network.judge_forwarding(on=True, listed=[ours, docker])
    assert found.status == "warn"
    assert "ip filter FORWARD" in found.cure


def test_the_default_network_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check names it for each driver. An unknown name is a failure, because `run` would fail."""
    monkeypatch.setenv("COPPICE_NETWORK", "user")
    found = network.default_network(tmp_path, Drivers())
    assert found.status == "ok"
    assert "qemu: user" in found.detail
    monkeypatch.setenv("COPPICE_NETWORK", "bridge")
    found = network.default_network(tmp_path, Drivers())
    assert found.status == "fail"
    assert "unset COPPICE_NETWORK" in found.cure


def test_a_host_network_that_overlaps_with_slots_is_reported() -> None:
    """Both address families are checked; the slots' own links and the default route do not count as
    overlaps.
    """
    four = [
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT",
        "eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0",
        "cp0a1b2c-77 4D0012C6 00000000 0005 0 0 0 FFFFFFFF 0 0 0",
    ]
    assert network.judge_addresses(surroundings.parse_routes(four)).status == "ok"
    lab = "lab0 000013C6 00000000 0001 0 0 0 0000FFFF 0 0 0"
    assert "lab0 leads to 198.19.0.0/16" in network.judge_addresses(surroundings.parse_routes([*four, lab])).detail
    zeros = "0" * 32
    six = [
        f"{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200 lo",
        f"fdc0bb1ce0000000{'0' * 16} 30 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001 lab0",
    ]
    assert network.judge_addresses(surroundings.parse_routes6(six[:1])).status == "ok"
    assert network.judge_addresses(surroundings.parse_routes6(six)).status == "warn"


@pytest.mark.parametrize(("root", "free", "recommended"), [(True, 100, True), (True, 10, False), (False, 100, False)])
def test_doctor_recommends_storage_where_it_can_be_made(root: bool, free: int, recommended: bool) -> None:
    """Only to root, and only if half of the free space is enough for machines."""
    found = storage.judge_reflinks(False, firecracker=True, free_bytes=free * GIB, root=root)
    assert found.status == "warn"
    assert ("coppice storage init --size 50G" in str(found.cure)) is recommended


def test_reflinks_matter_under_firecracker_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Firecracker, a file system without reflinks needs no cure: under QEMU clones are layers."""
    monkeypatch.setattr(storage, "has_reflinks", lambda *_: False)
    monkeypatch.delenv("COPPICE_FIRECRACKER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = storage.reflinks(tmp_path)
    assert (found.status, found.cure) == ("ok", "")
    assert found.detail == "do not work: under Firecracker the disks of forks and clones of volumes are copies"
    (tmp_path / "firecracker").touch(mode=0o755)
    assert storage.reflinks(tmp_path).status == "warn"
