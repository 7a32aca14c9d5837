"""Facts of this host's CPU and its KVM."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Literal

from coppice.model import Record

KvmDevice = Literal["ok", "missing", "denied", "broken"]

KVM = Path("/dev/kvm")
_KVM_GET_API_VERSION = 0xAE00  # _IO(0xAE, 0), linux/kvm.h
_KVM_CHECK_EXTENSION = 0xAE03
_KVM_API_VERSION = 12  # the same since 2007


class CpuFacts(Record, frozen=True, kw_only=True):
    """The lines of /proc/cpuinfo that decide where a capture can be restored."""

    flags: frozenset[str]
    model: str
    vendor: str

    @property
    def virtualization(self) -> bool:
        """Whether the CPU can run guests. Without this, KVM may open but hangs ordinary guests."""
        return bool(self.flags & {"vmx", "svm"})

    @property
    def flags_digest(self) -> str:
        """Return a digest that identifies the CPU as a guest under KVM sees it."""
        return hashlib.sha256(" ".join([self.model, *sorted(self.flags)]).encode()).hexdigest()[:16]


def parse_cpuinfo(text: str) -> CpuFacts:
    """Read the first processor of /proc/cpuinfo."""
    fields = dict(re.findall(r"^([\w ]+?)\s*:[ ]*(.*)$", text.partition("\n\n")[0], re.MULTILINE))
    return CpuFacts(
        flags=frozenset(fields.get("flags", "").split()),
        model=fields.get("model name", "unknown"),
        vendor=fields.get("vendor_id", "unknown"),
    )


@functools.cache
def read_cpu() -> CpuFacts:
    """Return the facts of this host's CPU, as of the first call."""
    return parse_cpuinfo(Path("/proc/cpuinfo").read_text())


def kvm_device(path: Path = KVM) -> KvmDevice:
    """Return whether this user can use /dev/kvm, which is often reserved for the group kvm."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return "missing"
    except PermissionError:
        return "denied"
    except OSError:
        return "broken"
    try:
        return "ok" if fcntl.ioctl(descriptor, _KVM_GET_API_VERSION) == _KVM_API_VERSION else "broken"
    except OSError:
        return "broken"
    finally:
        os.close(descriptor)


def missing_capabilities(wanted: dict[str, int]) -> list[str]:
    """Return the names of the KVM capabilities (KVM_CAP_* of linux/kvm.h, by number) that this host
    lacks.

    :raises OSError: the device cannot be opened or queried
    """
    descriptor = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    try:
        return [name for name, number in wanted.items() if fcntl.ioctl(descriptor, _KVM_CHECK_EXTENSION, number) <= 0]
    finally:
        os.close(descriptor)
