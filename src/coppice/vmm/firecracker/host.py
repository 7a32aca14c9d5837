"""Firecracker on this host: program, version, kind of build, KVM."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from coppice.errors import HostCannot, NotSupported
from coppice.linux.kvm import KVM, kvm_device
from coppice.vmm import program as programs
from coppice.vmm.firecracker.config import OLDEST, Release

PROGRAM: Final = "firecracker"
PROGRAM_VARIABLE: Final = "COPPICE_FIRECRACKER"
_VERSION = r"Firecracker v(\S+)"
_HINT = f"download a release from Firecracker's project page, and set {PROGRAM_VARIABLE} to its path"
_PT_INTERP: Final = 3

# linux/kvm.h; the list is Firecracker's own (`DEFAULT_CAPABILITIES` in its x86-64 KVM module).
KVM_CAPABILITIES: Final = {
    "IRQCHIP": 0, "USER_MEMORY": 3, "SET_TSS_ADDR": 4, "EXT_CPUID": 7, "MP_STATE": 14, "IRQFD": 32, "PIT2": 33,
    "PIT_STATE2": 35, "IOEVENTFD": 36, "ADJUST_CLOCK": 39, "VCPU_EVENTS": 41, "DEBUGREGS": 50, "XSAVE": 55, "XCRS": 56,
}  # fmt: skip

NO_KVM = {
    "missing": ("this host has no /dev/kvm, which Firecracker needs", "enable virtualization in the firmware, or use --vmm qemu"),
    "denied": ("this user may not open /dev/kvm", "run `usermod -aG kvm $USER` and log in again, or use --vmm qemu"),
    "broken": ("/dev/kvm does not work as KVM", "see `dmesg | grep -i kvm`, or use --vmm qemu"),
}  # fmt: skip


def program(environ: Mapping[str, str] = os.environ) -> str:
    """Return the absolute path of Firecracker: the value of COPPICE_FIRECRACKER, else the first
    match on PATH.

    :raises MissingTool: there is no such program
    :raises HostCannot: COPPICE_FIRECRACKER has another file name
    """
    return programs.find(PROGRAM, PROGRAM_VARIABLE, _HINT, environ)


async def version(program: str) -> str:
    """Return the version of a Firecracker program, such as `1.16.1`.

    :raises HostCannot: it does not answer
    """
    return await programs.version(program, _VERSION)


def require_release(version: str) -> Release:
    """Return the release of a version that the driver supports.

    :raises NotSupported: it is too old
    """
    found = programs.release(version)
    if found < OLDEST:
        raise NotSupported(
            f"Firecracker {version} is older than {'.'.join(map(str, OLDEST))}, the oldest that Coppice supports",
            hint=_HINT,
        )
    return found


def require_kvm(wanted: str, kvm: Path = KVM) -> None:
    """Refuse a host without KVM, or the choice of an emulator. `wanted` is `auto`, `kvm` or `tcg`.

    :raises NotSupported: emulation was requested
    :raises HostCannot: KVM cannot be used
    """
    if wanted == "tcg":
        raise NotSupported("Firecracker cannot emulate a CPU", hint="use --vmm qemu, or omit --accel")
    if (device := kvm_device(kvm)) != "ok":
        message, hint = NO_KVM[device]
        raise HostCannot(message, hint=hint)


def has_seccomp_filters(program: Path) -> bool:
    """Return whether a Firecracker limits its own system calls.

    Static (musl) builds do, dynamic (glibc) builds do not.

    :raises OSError: the file cannot be read
    """
    with program.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01":
            return False
        (offset,) = struct.unpack_from("<Q", head, 0x20)
        size, count = struct.unpack_from("<HH", head, 0x36)
        file.seek(offset)
        table = file.read(size * count)
    return all(struct.unpack_from("<I", table, at * size)[0] != _PT_INTERP for at in range(count))
