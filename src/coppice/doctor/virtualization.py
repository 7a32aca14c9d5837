"""Checks of KVM and QEMU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from coppice.errors import HostCannot, MissingTool
from coppice.linux.files import setting_of
from coppice.linux.kvm import KVM, KvmDevice, kvm_device, read_cpu
from coppice.model import Check
from coppice.vmm import program as programs
from coppice.vmm.qemu import host

OLDEST_TESTED_QEMU = (7, 2)
NEWEST_TRIED_QEMU = (11, 1)

_NX_HUGE_PAGES = Path("/sys/module/kvm/parameters/nx_huge_pages")
_ITLB_MULTIHIT = Path("/sys/devices/system/cpu/vulnerabilities/itlb_multihit")


def kvm() -> Check:
    """Check whether guests can run on the CPU itself."""
    virtual = read_cpu().virtualization
    return judge_kvm(virtual, kvm_device() if virtual or not KVM.exists() else "ok")


def judge_kvm(virtual: bool, device: KvmDevice) -> Check:
    """Judge KVM.

    :param virtual: whether the CPU shows vmx or svm
    :param device: the result of opening /dev/kvm; `ok` if it was not tried
    """
    slow = "guests are emulated (TCG), several times slower"
    if not virtual:
        detail = f"the CPU shows neither vmx nor svm: {slow}"
        if device != "missing":
            detail += "; /dev/kvm exists, but may hang a guest without the CPU's support, and is not used"
        return _kvm("warn", detail, "enable virtualization in the firmware, or nested virtualization if this is a VM")
    match device:
        case "ok":
            return _kvm("ok", "guests run on the CPU itself")
        case "missing":
            return _kvm(
                "warn",
                f"the CPU supports it, but there is no /dev/kvm: {slow}",
                "modprobe kvm_intel || modprobe kvm_amd",
            )
        case "denied":
            return _kvm("warn", f"this user may not open /dev/kvm: {slow}", "usermod -aG kvm $USER, then log in again")
        case "broken":
            return _kvm("warn", f"/dev/kvm does not work as KVM: {slow}", "see `dmesg | grep -i kvm`")


async def qemu() -> Check:
    """Check whether QEMU is installed, and its version."""
    try:
        return judge_qemu(await host.version())
    except (MissingTool, HostCannot) as error:
        return Check(name="qemu", status="fail", detail=error.message, cure=_typed(error.hint))


def _typed(hint: str | None) -> str:
    """Return the command in a hint: cures are bare commands."""
    return (hint or "").removeprefix("run ").strip("`")


def judge_qemu(version: str) -> Check:
    """Judge QEMU's version text, for example `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`."""
    if programs.release(version) < OLDEST_TESTED_QEMU:
        oldest = ".".join(map(str, OLDEST_TESTED_QEMU))
        return Check(
            name="qemu",
            status="warn",
            detail=f"version {version} is older than {oldest}, the oldest that is tested",
            cure="apt-get install qemu-system-x86 from a newer release",
        )
    if programs.release(version) > NEWEST_TRIED_QEMU:
        newest = ".".join(map(str, NEWEST_TRIED_QEMU))
        return Check(
            name="qemu",
            status="warn",
            detail=f"version {version} is newer than {newest}, the newest that Coppice was tried with",
            cure="fork a machine once before you rely on templates, or set COPPICE_QEMU to an older release",
        )
    return Check(name="qemu", status="ok", detail=f"version {version}")


def nx_huge_pages() -> Check:
    """Check whether KVM splits huge pages, with a kernel thread for each VM."""
    return judge_nx_huge_pages(
        read_cpu().virtualization,
        setting_of(_NX_HUGE_PAGES),
        affected=not setting_of(_ITLB_MULTIHIT).startswith("Not affected"),
    )


def judge_nx_huge_pages(virtual: bool, value: str, *, affected: bool) -> Check:
    """Judge the module's parameter. Unless it is `never`, the first vCPU of a VM waits for a new
    worker thread.

    Source: Firecracker's docs, "production host setup".

    :param affected: whether the CPU has the iTLB multihit flaw, against which the parameter
        protects
    """
    name = "kvm.nx_huge_pages"
    if not virtual or not value:
        return Check(name=name, status="ok", detail="KVM is not used")
    if value == "never":
        return Check(name=name, status="ok", detail="never: no worker thread for each VM")
    if affected:
        return Check(name=name, status="ok", detail=f"{value}: this CPU needs it against the iTLB multihit flaw")
    return Check(
        name=name,
        status="warn",
        detail=f"{value}: each start of a VM makes a worker thread that this CPU does not need",
        cure="echo options kvm nx_huge_pages=never > /etc/modprobe.d/kvm.conf, then load kvm again",
    )


def _kvm(status: Literal["ok", "warn"], detail: str, cure: str = "") -> Check:
    return Check(name="kvm", status=status, detail=detail, cure=cure)
