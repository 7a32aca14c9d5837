"""Checks of what runs the guests: KVM and QEMU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from coppice.errors import MissingTool
from coppice.model import Check
from coppice.vmm.qemu import host

OLDEST_TESTED_QEMU = (7, 2)

_NX_HUGE_PAGES = Path("/sys/module/kvm/parameters/nx_huge_pages")
_ITLB_MULTIHIT = Path("/sys/devices/system/cpu/vulnerabilities/itlb_multihit")


def kvm() -> Check:
    """Whether guests can run on the CPU itself."""
    virtual = host.read_cpu().virtualization
    return judge_kvm(virtual, host.kvm_device() if virtual or not host.KVM.exists() else "ok")


def judge_kvm(virtual: bool, device: host.KvmDevice) -> Check:
    """`virtual`: the CPU shows vmx or svm. `device`: what opening /dev/kvm gave; not tried where the CPU shows neither."""
    slow = "guests are emulated (TCG), several times slower"
    if not virtual:
        detail = f"the CPU shows neither vmx nor svm: {slow}"
        if device != "missing":
            detail += "; there is a /dev/kvm, but without the CPU's help it may hang a guest, and is not used"
        return _kvm(
            "warn", detail, "enable virtualization in the firmware, or nested virtualization where this is a VM"
        )
    match device:
        case "ok":
            return _kvm("ok", "guests run on the CPU itself")
        case "missing":
            return _kvm(
                "warn", f"the CPU could, but there is no /dev/kvm: {slow}", "modprobe kvm_intel || modprobe kvm_amd"
            )
        case "denied":
            return _kvm("warn", f"/dev/kvm is not for this user: {slow}", "usermod -aG kvm $USER, then log in again")
        case "broken":
            return _kvm("warn", f"/dev/kvm is not what it should be: {slow}", "see `dmesg | grep -i kvm`")


async def qemu() -> Check:
    """Whether QEMU is there."""
    try:
        return judge_qemu(await host.version())
    except MissingTool as error:
        return Check(name="qemu", status="fail", detail=error.message, cure="apt-get install qemu-system-x86")


def judge_qemu(version: str) -> Check:
    """`version` as QEMU says it: `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`."""
    if host.release(version) < OLDEST_TESTED_QEMU:
        oldest = ".".join(map(str, OLDEST_TESTED_QEMU))
        return Check(
            name="qemu",
            status="warn",
            detail=f"version {version} is older than {oldest}, the oldest that is tested",
            cure="apt-get install qemu-system-x86 from a newer release",
        )
    return Check(name="qemu", status="ok", detail=f"version {version}")


def nx_huge_pages() -> Check:
    """Whether KVM splits huge pages, with a kernel thread for each VM."""
    return judge_nx_huge_pages(
        host.read_cpu().virtualization,
        _read(_NX_HUGE_PAGES),
        affected=not _read(_ITLB_MULTIHIT).startswith("Not affected"),
    )


def judge_nx_huge_pages(virtual: bool, value: str, *, affected: bool) -> Check:
    """`value` of the module's parameter; `affected` by the iTLB multihit flaw, against which it protects.

    With anything but `never` the first vCPU of a VM waits for a worker thread to be made (Firecracker's docs, "production host setup").
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


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _kvm(status: Literal["ok", "warn"], detail: str, cure: str = "") -> Check:
    return Check(name="kvm", status=status, detail=detail, cure=cure)
