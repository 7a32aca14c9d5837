"""What this host offers QEMU: the program, its version, the accelerator, the frequency of the time-stamp counter."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import functools
import hashlib
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coppice.errors import HostCannot, MissingTool

KvmDevice = Literal["ok", "missing", "denied", "broken"]

PROGRAM = "qemu-system-x86_64"
KVM = Path("/dev/kvm")
_KVM_GET_API_VERSION = 0xAE00  # _IO(0xAE, 0), linux/kvm.h
_KVM_API_VERSION = 12  # the same since 2007
EXACT_S = 0.05  # a sample of this length is exact to about 0.01 %
QUICK_S = 0.005
_VERSION_DEADLINE_S = 20.0
_versions: dict[tuple[str, int], str] = {}


@dataclass(frozen=True)
class CpuFacts:
    """The lines of /proc/cpuinfo that decide."""

    flags: frozenset[str]
    mhz: float
    model: str

    @property
    def virtualization(self) -> bool:
        """Whether the CPU itself can run guests. A software KVM opens without it, and then hangs an ordinary guest."""
        return bool(self.flags & {"vmx", "svm"})

    @property
    def flags_digest(self) -> str:
        """Names the CPU as a guest under KVM sees it."""
        return hashlib.sha256(" ".join([self.model, *sorted(self.flags)]).encode()).hexdigest()[:16]


def parse_cpuinfo(text: str) -> CpuFacts:
    """Read the first processor of /proc/cpuinfo."""
    fields = dict(re.findall(r"^([\w ]+?)\s*:[ ]*(.*)$", text.partition("\n\n")[0], re.MULTILINE))
    return CpuFacts(
        flags=frozenset(fields.get("flags", "").split()),
        mhz=float(fields.get("cpu MHz", "0") or 0),
        model=fields.get("model name", "unknown"),
    )


def read_cpu() -> CpuFacts:
    """The CPU of this host."""
    return parse_cpuinfo(Path("/proc/cpuinfo").read_text())


def kvm_device(path: Path = KVM) -> KvmDevice:
    """What opening /dev/kvm gives: on a host that has it, it may be for the group kvm only."""
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


_NO_KVM: dict[KvmDevice, tuple[str, str]] = {
    "missing": ("this host has no /dev/kvm", "use --accel tcg, or enable virtualization in the firmware"),
    "denied": ("/dev/kvm is not for this user", "use --accel tcg, or `usermod -aG kvm $USER` and log in again"),
    "broken": ("/dev/kvm is not what it should be", "use --accel tcg, or see `dmesg | grep -i kvm`"),
}


def choose_accel(wanted: str, cpu: CpuFacts, kvm: Path = KVM) -> str:
    """`auto` takes KVM only where the CPU has vmx or svm, and this user may use it; `kvm` and `tcg` are taken at their word.

    :raises HostCannot: KVM was asked for and cannot be used
    """
    if wanted == "auto":
        return "kvm" if cpu.virtualization and kvm_device(kvm) == "ok" else "tcg"
    if wanted == "kvm" and (device := kvm_device(kvm)) != "ok":
        message, hint = _NO_KVM[device]
        raise HostCannot(message, hint=hint)
    return wanted


@functools.cache
def tsc_khz(sample_s: float) -> int:
    """Frequency of the host's time-stamp counter, measured once per process against the monotonic clock; blocks for `sample_s`.

    `cpu MHz` of /proc/cpuinfo is another thing: on bare metal it is the current frequency of a core.
    """
    # rdtsc; shl rdx, 32; or rax, rdx; ret
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(bytes.fromhex("0f3148c1e2204809d0c3"))
        anchor = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        begin_ns, begin = _instant(read)
        time.sleep(sample_s)
        end_ns, end = _instant(read)
        del anchor, read  # the page cannot be unmapped while something points into it
    return round((end - begin) * 1_000_000 / (end_ns - begin_ns))


def _instant(read: Callable[[], int]) -> tuple[int, int]:
    """Nanoseconds and ticks of one instant: of several readings that in which the least came between."""
    clock = time.clock_gettime_ns
    readings = []
    for _ in range(5):
        before, ticks, after = clock(time.CLOCK_MONOTONIC_RAW), read(), clock(time.CLOCK_MONOTONIC_RAW)
        readings.append((after - before, (before + after) // 2, ticks))
    return min(readings)[1:]


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version as QEMU says it, `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`; (0, 0) if it says none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


async def version(program: str = PROGRAM) -> str:
    """QEMU's version and package, as it says itself; asked once per program file.

    :raises MissingTool: QEMU is not installed
    :raises HostCannot: it does not answer
    """
    path = shutil.which(program)
    if path is None:
        raise MissingTool(f"{program} is not installed", hint="run `apt-get install qemu-system-x86`")
    key = (path, Path(path).stat().st_mtime_ns)
    if key not in _versions:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), _VERSION_DEADLINE_S)
        except TimeoutError as error:
            raise HostCannot(
                f"{path} --version did not end within {_VERSION_DEADLINE_S:g} s",
                hint="see whether the host is overloaded",
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        found = re.search(r"version (\S+(?: \([^)]*\))?)", output.decode(errors="replace"))
        _versions[key] = found[1] if found else "unknown"
    return _versions[key]
