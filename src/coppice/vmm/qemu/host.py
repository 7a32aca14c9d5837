"""QEMU on this host: program, version, accelerator, frequency of the time-stamp counter."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from coppice.errors import HostCannot
from coppice.linux.kvm import KVM, CpuFacts, KvmDevice, kvm_device
from coppice.vmm import program as programs

PROGRAM = "qemu-system-x86_64"
PROGRAM_VARIABLE = "COPPICE_QEMU"
EXACT_S = 0.05  # a sample of this length has an error of about 0.01 %
QUICK_S = 0.005
_VERSION = r"version (\S+(?: \([^)]*\))?)"


_NO_KVM: dict[KvmDevice, tuple[str, str]] = {
    "missing": ("this host has no /dev/kvm", "use --accel tcg, or enable virtualization in the firmware"),
    "denied": ("this user may not open /dev/kvm", "use --accel tcg, or run `usermod -aG kvm $USER` and log in again"),
    "broken": ("/dev/kvm does not work as KVM", "use --accel tcg, or see `dmesg | grep -i kvm`"),
}


_measured: dict[float, int] = {}


def choose_accel(wanted: str, cpu: CpuFacts, kvm: Path = KVM) -> str:
    """Return the accelerator to use. `auto` is KVM if the CPU has vmx or svm and this user may use
    KVM, else TCG.

    :raises HostCannot: `wanted` is `kvm`, which cannot be used
    """
    if wanted == "auto":
        return "kvm" if cpu.virtualization and kvm_device(kvm) == "ok" else "tcg"
    if wanted == "kvm" and (device := kvm_device(kvm)) != "ok":
        message, hint = _NO_KVM[device]
        raise HostCannot(message, hint=hint)
    return wanted


def kvm_cpu_model(cpu: CpuFacts) -> str:
    """Return QEMU's `-cpu` of a guest under KVM, which has the host's CPU.

    ARCH_CAPABILITIES is a register of Intel's. QEMU gives it to guests of other CPUs too, and ends
    by an assertion where KVM cannot keep its value ("failed to set MSR 0x10a to 0x69", seen in
    virtual machines on AMD EPYC).
    """
    return "host" if cpu.vendor == "GenuineIntel" else "host,arch-capabilities=off"


async def tsc_khz(sample_s: float) -> int:
    """Return the frequency of the host's time-stamp counter in kHz, from a sample of this length. It is
    measured once per process.
    """
    if sample_s not in _measured:
        _measured[sample_s] = await asyncio.to_thread(_measure_tsc_khz, sample_s)
    return _measured[sample_s]


def _measure_tsc_khz(sample_s: float) -> int:
    """Measure against the monotonic clock. Blocks for `sample_s`.

    `cpu MHz` in /proc/cpuinfo is no substitute: on bare metal it is the current frequency of a core.
    """
    # rdtsc; shl rdx, 32; or rax, rdx; ret
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(bytes.fromhex("0f3148c1e2204809d0c3"))
        anchor = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        begin_ns, begin = _instant(read)
        time.sleep(sample_s)
        end_ns, end = _instant(read)
        del anchor, read  # the page cannot be unmapped while they point into it
    return round((end - begin) * 1_000_000 / (end_ns - begin_ns))


def _instant(read: Callable[[], int]) -> tuple[int, int]:
    """Return nanoseconds and ticks of one instant: the quickest of several readings."""
    clock = time.clock_gettime_ns
    readings = []
    for _ in range(5):
        before, ticks, after = clock(time.CLOCK_MONOTONIC_RAW), read(), clock(time.CLOCK_MONOTONIC_RAW)
        readings.append((after - before, (before + after) // 2, ticks))
    return min(readings)[1:]


def program(environ: Mapping[str, str] = os.environ) -> str:
    """Return the absolute path of QEMU: the value of COPPICE_QEMU, or else the first one on PATH.

    :raises MissingTool: there is no such program
    :raises HostCannot: COPPICE_QEMU has another file name, by which recovery would not find a VMM
    """
    return programs.find(PROGRAM, PROGRAM_VARIABLE, "run `apt-get install qemu-system-x86`", environ)


async def version(path: str | None = None) -> str:
    """Return QEMU's version and package as QEMU prints them.

    QEMU is run once per program file; the user's cache remembers the answer.

    :param path: the program, by default `program()`
    :raises MissingTool: QEMU is not installed
    :raises HostCannot: the program does not end in time, or is not QEMU
    """
    return await programs.version(path or program(), _VERSION)
