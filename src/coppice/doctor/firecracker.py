"""The check of Firecracker: the binary, its version and build, and the KVM capabilities that it
needs.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from coppice.errors import HostCannot, MissingTool, NotSupported
from coppice.linux.kvm import KvmDevice, kvm_device, missing_capabilities
from coppice.model import Check
from coppice.vmm import program as programs
from coppice.vmm.firecracker import host
from coppice.vmm.firecracker.config import NEWEST_TRIED

_NAME = "firecracker"


async def firecracker() -> Check:
    """Check whether machines can run on Firecracker.

    A host without it passes: nothing else needs it.
    """
    try:
        program = host.program()
        version = await host.version(program)
        host.require_release(version)
    except (MissingTool, HostCannot, NotSupported) as error:
        if isinstance(error, MissingTool) and not os.environ.get(host.PROGRAM_VARIABLE):
            return Check(name=_NAME, status="ok", detail="not installed; only `--vmm firecracker` needs it")
        return Check(name=_NAME, status="fail", detail=error.message, cure=error.hint or "")
    device = await asyncio.to_thread(kvm_device)
    lacking = await asyncio.to_thread(missing_capabilities, host.KVM_CAPABILITIES) if device == "ok" else []
    filters = await asyncio.to_thread(host.has_seccomp_filters, Path(program))
    return judge_firecracker(version, device, lacking, filters=filters)


def judge_firecracker(version: str, device: KvmDevice, lacking: list[str], *, filters: bool) -> Check:
    """Judge Firecracker.

    :param device: the result of opening /dev/kvm
    :param lacking: capabilities that this host's KVM does not have
    :param filters: whether the build has seccomp filters
    """
    said = f"version {version}"
    if device != "ok":
        message, hint = host.NO_KVM[device]
        return Check(name=_NAME, status="fail", detail=f"{said}; {message}", cure=hint)
    if lacking:
        names = ", ".join(f"KVM_CAP_{name}" for name in lacking)
        return Check(
            name=_NAME,
            status="fail",
            detail=f"{said}; the host's KVM lacks {names}",
            cure="use a newer kernel, or --vmm qemu",
        )
    if not filters:
        return Check(
            name=_NAME,
            status="warn",
            detail=f"{said}, a dynamic (glibc) build, whose seccomp filters allow everything: a guest that breaks out can make any system call",
            cure="use a static (musl) build, as the project's releases are",
        )
    if programs.release(version) > NEWEST_TRIED:
        return Check(
            name=_NAME,
            status="warn",
            detail=f"{said} is newer than {'.'.join(map(str, NEWEST_TRIED))}, the newest that Coppice was tried with",
            cure=f"fork a machine once before you rely on templates, or set {host.PROGRAM_VARIABLE} to an older release",
        )
    return Check(name=_NAME, status="ok", detail=f"{said}, with seccomp filters; KVM has all required capabilities")
