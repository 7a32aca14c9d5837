"""The platforms of the real-VM tests: a VMM, an accelerator and a guest kernel.

QEMU runs the tests everywhere. COPPICE_TEST_KERNEL names an uncompressed guest kernel with built-in
drivers and without ACPI: if it is set and /dev/kvm can be used, each test also runs under KVM with
that kernel, marked `kvm`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from coppice.boot.kernel import KernelStore
from coppice.client import AsyncHost
from coppice.linux.kvm import kvm_device

TEST_KERNEL = "COPPICE_TEST_KERNEL"


@dataclass(frozen=True)
class Platform:
    """One way to run machines."""

    name: str
    accel: str = "auto"
    kernel: Path | None = None  # None means Debian's

    def host(self, home: Path) -> AsyncHost:
        """Return an unopened host whose new machines use this platform.

        It starts nothing ahead, so that a test knows each machine.
        """
        return AsyncHost(home, accel=self.accel, spares=0)

    def place_kernel(self, kernels: Path) -> None:
        """Put this platform's kernel in place of Debian's as the default, if it is another one."""
        if self.kernel is None:
            return
        shutil.rmtree(kernels, ignore_errors=True)
        added = KernelStore(kernels).add(self.kernel, no_modules=True, acpi=False)
        (kernels / added.key).rename(kernels / added.key.replace("custom-", "debian-", 1))


EMULATED = Platform("emulated")


def platforms() -> list[object] | None:
    """Return the parameters of the fixture `platform`; None if this host runs only `EMULATED`."""
    if not (kernel := os.environ.get(TEST_KERNEL)) or kvm_device() != "ok":
        return None
    kvm = Platform("kvm", "kvm", Path(kernel))
    return [pytest.param(EMULATED, id=EMULATED.name), pytest.param(kvm, id=kvm.name, marks=pytest.mark.kvm)]
