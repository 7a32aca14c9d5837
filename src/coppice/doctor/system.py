"""Checks of programs, the kernel image, limits, mounts and namespaces."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from coppice.boot.kernel import KernelStore
from coppice.errors import HostCannot, MissingTool
from coppice.linux.files import number_of
from coppice.linux.kvm import read_cpu
from coppice.linux.mounts import Mount, read_mounts
from coppice.model import MIB, Check
from coppice.vmm import program as programs
from coppice.vmm.qemu import host
from coppice.vmm.qemu.releases import READ_ONLY_RAM

_SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_ENOUGH_FILES = 4096
_ENOUGH_PROCESSES = 4096
_ENOUGH_LOCKED = 8 * MIB  # the kernel's default since 5.16
_MANY_MOUNTS = 1000


class _Tool(NamedTuple):
    program: str
    package: str
    missing: Literal["warn", "fail"]
    purpose: str


_TOOLS = (
    _Tool("mke2fs", "e2fsprogs", "fail", "makes the disks of instances"),
    _Tool("e2fsck", "e2fsprogs", "warn", "checks the disks of instances"),
    _Tool("prlimit", "util-linux", "fail", "limits the files that the repair of a volume writes"),
    _Tool("setpriv", "util-linux", "fail", "ends every tool when the process that started it is killed"),
    _Tool("apt-get", "apt", "warn", "fetches Debian's kernel"),
    _Tool("dpkg-deb", "dpkg", "warn", "unpacks Debian's kernel"),
    _Tool("mmdebstrap", "mmdebstrap", "warn", "makes images of Debian suites"),
    _Tool("skopeo", "skopeo", "warn", "pulls images from registries"),
)


def tools() -> list[tuple[str, Callable[[], Check]]]:
    """Return a check for each program that Coppice runs."""
    return [(tool.program, partial(_tool, tool)) for tool in _TOOLS]


def _tool(tool: _Tool) -> Check:
    path = shutil.which(tool.program, path=_SEARCH_PATH)
    if path:
        return Check(name=tool.program, status="ok", detail=path)
    detail, cure = f"not installed; it {tool.purpose}", f"apt-get install {tool.package}"
    return Check(name=tool.program, status=tool.missing, detail=detail, cure=cure)


def kernel_image(home: Path) -> Check:
    """Check whether a kernel to boot is stored."""
    kernels = KernelStore(home / "kernels").kernels()
    if not kernels:
        detail = "none yet: Debian's cloud kernel, 27 MB, is fetched with the first instance"
        return Check(name="kernel image", status="warn", detail=detail, cure="coppice kernel fetch")
    return Check(name="kernel image", status="ok", detail=", ".join(kernel.key for kernel in kernels))


def open_files() -> Check:
    """Check the limit on open files."""
    return judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def judge_open_files(soft: int, hard: int) -> Check:
    """Judge the limit: a fan-out holds a dozen descriptors for each fork that it starts."""
    if _within(soft, _ENOUGH_FILES):
        raised = 65536
        cure = (
            f"ulimit -n {raised if not _within(hard, raised) else hard}, or LimitNOFILE={raised} in the service's unit"
        )
        return Check(name="open files", status="warn", detail=f"{soft} may be too few for a large fan-out", cure=cure)
    return Check(name="open files", status="ok", detail=_limit(soft))


def processes() -> Check:
    """Check the limit on processes and threads."""
    return judge_processes(resource.getrlimit(resource.RLIMIT_NPROC)[0], root=os.geteuid() == 0)


def judge_processes(soft: int, *, root: bool) -> Check:
    """Judge the limit, which does not bind root: a VM has three threads, and one for each vCPU."""
    if not root and _within(soft, _ENOUGH_PROCESSES):
        detail = f"{soft} threads are enough for some {soft // 4} VMs"
        return Check(name="processes", status="warn", detail=detail, cure="raise nproc in /etc/security/limits.d")
    return Check(name="processes", status="ok", detail=_limit(soft) + (", and root is not bound by it" if root else ""))


def locked_memory() -> Check:
    """Check the limit on locked memory."""
    return judge_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], root=os.geteuid() == 0)


def judge_locked_memory(soft: int, *, root: bool) -> Check:
    """Judge the limit, which does not bind root.

    Guest memory is never locked, but on old kernels io_uring in QEMU may count against the limit.
    """
    if not root and _within(soft, _ENOUGH_LOCKED):
        detail = f"{soft >> 10} KiB: below the kernel's default, io_uring may not work"
        return Check(name="locked memory", status="warn", detail=detail, cure="raise memlock in /etc/security/limits.d")
    return Check(name="locked memory", status="ok", detail=_limit(soft))


def mount_count() -> Check:
    """Check how many mounts a new namespace copies."""
    return judge_mount_count(len(read_mounts()))


def judge_mount_count(count: int) -> Check:
    """Judge the count: a new mount namespace copies all mounts under one kernel-wide lock."""
    if count > _MANY_MOUNTS:
        detail = f"{count}: every network namespace and container that starts or ends pays for them"
        return Check(name="mounts", status="warn", detail=detail, cure="see `findmnt`, and unmount stale mounts")
    return Check(name="mounts", status="ok", detail=str(count))


def favordynmods() -> Check:
    """Check whether threads move between control groups quickly."""
    return judge_favordynmods(read_mounts(), virtual=read_cpu().virtualization)


def judge_favordynmods(mounts: list[Mount], *, virtual: bool) -> Check:
    """Warn if favordynmods is not set: since Linux 6.0 a move into a group then waits for an RCU
    grace period.

    KVM moves its worker threads into the VMM's group (Documentation/admin-guide/cgroup-v2.rst).
    """
    name = "favordynmods"
    groups = [mount for mount in mounts if mount.type == "cgroup2"]
    if not virtual or not groups:
        return Check(name=name, status="ok", detail="KVM is not used" if groups else "there is no cgroup2 here")
    if all("favordynmods" in mount.options for mount in groups):
        return Check(name=name, status="ok", detail="set")
    cure = f"mount -o remount,favordynmods {groups[0].point}"
    return Check(
        name=name,
        status="warn",
        detail="not set: each start under KVM waits for the kernel, some milliseconds",
        cure=cure,
    )


async def user_namespaces() -> Check:
    """Check whether a user who is not root can make user namespaces."""
    try:
        release = programs.release(await host.version())
    except (MissingTool, HostCannot):  # reported by another check
        release = READ_ONLY_RAM
    return judge_user_namespaces(
        root=os.geteuid() == 0,
        qemu=release >= READ_ONLY_RAM,
        most=number_of(Path("/proc/sys/user/max_user_namespaces")),
        unprivileged=number_of(Path("/proc/sys/kernel/unprivileged_userns_clone")),
        restricted=number_of(Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")),
    )


def judge_user_namespaces(
    *, root: bool, qemu: bool, most: int | None, unprivileged: int | None, restricted: int | None
) -> Check:
    """Judge the three settings that may forbid user namespaces; None if the kernel does not have
    one.

    :param qemu: whether this QEMU runs without a user namespace
    """
    cures = {
        "sysctl -w user.max_user_namespaces=15000": most == 0 or most is None,
        "sysctl -w kernel.unprivileged_userns_clone=1": unprivileged == 0,
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0": bool(restricted),
    }
    if root:
        return Check(name="user namespaces", status="ok", detail="not needed by root")
    for cure, needed in cures.items():
        if needed:
            images = "not permitted to this user: images of Debian suites need root"
            if qemu:
                return Check(name="user namespaces", status="warn", detail=images, cure=cure)
            oldest = ".".join(map(str, READ_ONLY_RAM))
            detail = f"{images}, and so does QEMU before {oldest}: no machine can be started"
            return Check(name="user namespaces", status="fail", detail=detail, cure=cure)
    return Check(name="user namespaces", status="ok", detail="work without root")


def _within(limit: int, enough: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < enough


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
