"""What this host offers QEMU: the program, its version, the accelerator, the frequency of the time-stamp counter."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from coppice.errors import HostCannot, MissingTool

PROGRAM = "qemu-system-x86_64"
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


def choose_accel(wanted: str, cpu: CpuFacts, kvm: Path = Path("/dev/kvm")) -> str:
    """`auto` takes KVM only where the CPU has vmx or svm; `kvm` and `tcg` are taken at their word.

    :raises HostCannot: KVM was asked for and there is no /dev/kvm
    """
    if wanted == "auto":
        return "kvm" if cpu.virtualization and kvm.exists() else "tcg"
    if wanted == "kvm" and not kvm.exists():
        raise HostCannot("this host has no /dev/kvm", hint="use --accel tcg, or enable virtualization in the firmware")
    return wanted


async def version(program: str = PROGRAM) -> str:
    """QEMU's version and package, as it says itself; asked once per program file.

    :raises MissingTool: QEMU is not installed
    """
    path = shutil.which(program)
    if path is None:
        raise MissingTool(f"{program} is not installed", hint="run `apt-get install qemu-system-x86`")
    key = (path, Path(path).stat().st_mtime_ns)
    if key not in _versions:
        process = await asyncio.create_subprocess_exec(path, "--version", stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), 20)
        found = re.search(r"version (\S+(?: \([^)]*\))?)", output.decode(errors="replace"))
        _versions[key] = found[1] if found else "unknown"
    return _versions[key]
