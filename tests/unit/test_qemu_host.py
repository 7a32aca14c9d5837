"""What of the host QEMU is given: KVM only where it can be used."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from coppice.errors import HostCannot, VmmDied
from coppice.vmm.process import start_ticks
from coppice.vmm.qemu import host
from coppice.vmm.qemu.driver import ended_at_once

WITH_VMX = host.parse_cpuinfo("flags\t\t: fpu vmx sse\n")
WITHOUT = host.parse_cpuinfo("flags\t\t: fpu sse\n")


def test_kvm_that_is_not_there_or_not_kvm(tmp_path: Path) -> None:
    """Left to itself QEMU is given emulation; who asks for KVM is told what it lacks."""
    (tmp_path / "file").touch()
    for path, word in ((tmp_path / "none", "has no"), (tmp_path / "file", "not what")):
        assert host.choose_accel("auto", WITH_VMX, path) == "tcg"
        with pytest.raises(HostCannot, match=word):
            host.choose_accel("kvm", WITH_VMX, path)


def test_kvm_of_a_group_that_the_user_is_not_in(tmp_path: Path) -> None:
    """Debian gives /dev/kvm to the group kvm: a user outside of it runs emulated, as doctor says, and is told how to come in."""
    device = tmp_path / "kvm"
    device.touch(mode=0o000)
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.callback(os.seteuid, 0)
            os.seteuid(65534)
        assert host.choose_accel("auto", WITH_VMX, device) == "tcg"
        with pytest.raises(HostCannot, match="not for this user") as refused:
            host.choose_accel("kvm", WITH_VMX, device)
    assert "usermod -aG kvm" in str(refused.value)


def test_kvm_without_the_cpus_help_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A software KVM opens, and hangs an ordinary guest; who insists has it."""
    monkeypatch.setattr(host, "kvm_device", lambda *_: "ok")
    assert host.choose_accel("auto", WITHOUT) == "tcg"
    assert host.choose_accel("auto", WITH_VMX) == "kvm"
    assert host.choose_accel("kvm", WITHOUT) == "kvm"


def test_a_user_without_namespaces_is_told_what_the_host_lacks() -> None:
    """It is not QEMU's fault that it was never started; what QEMU itself says is shown as it is."""
    refused = ended_at_once("unshare: unshare failed: No space left on device")
    assert isinstance(refused, HostCannot)
    assert "user namespace" in refused.message
    assert "doctor" in (refused.hint or "")
    assert isinstance(ended_at_once("-netdev user: Could not set up host forwarding rule"), VmmDied)


async def test_a_program_that_does_not_say_its_version_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is overloaded, or another program of that name: an error of ours within the deadline, or a cancellation; and no process is left."""
    told = tmp_path / "pid"
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\necho $$ > {told}\nexec sleep 600\n")
    program.chmod(0o755)
    os.mkfifo(told)
    asking = asyncio.create_task(host.version(str(program)))
    pid = int(await asyncio.to_thread(told.read_text))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert start_ticks(pid) is None
    told.unlink()
    monkeypatch.setattr(host, "_VERSION_DEADLINE_S", 0.2)
    with pytest.raises(HostCannot, match="--version"):
        await host.version(str(program))
