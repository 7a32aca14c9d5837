"""The host's accelerator for QEMU: KVM only if it can be used."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from coppice.errors import HostCannot, MissingTool, UsageError
from coppice.linux.kvm import parse_cpuinfo
from coppice.vmm import program as program_files
from coppice.vmm.process import start_ticks
from coppice.vmm.qemu import host
from coppice.vmm.qemu.driver import QemuDriver

WITH_VMX = parse_cpuinfo("flags\t\t: fpu vmx sse\n")
WITHOUT = parse_cpuinfo("flags\t\t: fpu sse\n")


def test_a_missing_or_broken_kvm_is_not_used(tmp_path: Path) -> None:
    """By default QEMU then emulates; an explicit request for KVM fails with the reason."""
    (tmp_path / "file").touch()
    for path, word in ((tmp_path / "none", "has no"), (tmp_path / "file", "does not work")):
        assert host.choose_accel("auto", WITH_VMX, path) == "tcg"
        with pytest.raises(HostCannot, match=word):
            host.choose_accel("kvm", WITH_VMX, path)


def test_kvm_of_another_group_is_not_used(tmp_path: Path) -> None:
    """Debian gives /dev/kvm to the group kvm: a user outside the group runs emulated, and the error
    says how to join.
    """
    device = tmp_path / "kvm"
    device.touch(mode=0o000)
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.callback(os.seteuid, 0)
            os.seteuid(65534)
        assert host.choose_accel("auto", WITH_VMX, device) == "tcg"
        with pytest.raises(HostCannot, match="may not open") as refused:
            host.choose_accel("kvm", WITH_VMX, device)
    assert "usermod -aG kvm" in str(refused.value)


def test_kvm_without_the_cpus_support_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM in software opens, but hangs an ordinary guest; an explicit request still gets it."""
    monkeypatch.setattr(host, "kvm_device", lambda *_: "ok")
    assert host.choose_accel("auto", WITHOUT) == "tcg"
    assert host.choose_accel("auto", WITH_VMX) == "kvm"
    assert host.choose_accel("kvm", WITHOUT) == "kvm"


@pytest.mark.parametrize(
    ("vendor", "model"),
    [("GenuineIntel", "host"), ("AuthenticAMD", "host,arch-capabilities=off")],
)
def test_only_guests_of_intel_have_its_registers(vendor: str, model: str) -> None:
    """QEMU dies on some hosts if it gives a register of Intel's to the guest of another CPU. The tiny
    guest shows on each host with KVM that its model works.
    """
    assert host.kvm_cpu_model(parse_cpuinfo(f"vendor_id\t: {vendor}\nflags\t\t: fpu\n")) == model


async def test_a_program_that_prints_no_version_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may be overloaded, or the program another one of that name: the query ends at its
    deadline or its cancellation, and leaves no process.
    """
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
    monkeypatch.setattr(program_files, "_VERSION_DEADLINE_S", 0.2)
    with pytest.raises(HostCannot, match="--version"):
        await host.version(str(program))


def test_the_user_may_choose_qemu(tmp_path: Path) -> None:
    """COPPICE_QEMU takes precedence over PATH. The path is made absolute, because the program
    starts in another directory.
    """
    path = str(tmp_path / "path")
    chosen, found = tmp_path / "chosen" / host.PROGRAM, tmp_path / "path" / host.PROGRAM
    for program in (chosen, found):
        program.parent.mkdir()
        program.touch(mode=0o755)
    assert host.program({"PATH": path}) == str(found)
    assert host.program({"PATH": path, "COPPICE_QEMU": ""}) == str(found)
    assert host.program({"PATH": path, "COPPICE_QEMU": str(chosen)}) == str(chosen)
    assert Path(host.program({"PATH": path, "COPPICE_QEMU": os.path.relpath(chosen)})).is_absolute()


def test_an_unusable_qemu_is_named(tmp_path: Path) -> None:
    """A VMM without a record yet is found by the name of its program, so a program of another name
    is refused before it starts.
    """
    with pytest.raises(MissingTool, match="COPPICE_QEMU is /nowhere"):
        host.program({"COPPICE_QEMU": "/nowhere/qemu-system-x86_64"})
    with pytest.raises(MissingTool, match="not installed") as missing:
        host.program({"PATH": str(tmp_path)})
    assert "apt-get install" in (missing.value.hint or "")
    other = tmp_path / "qemu-kvm"
    other.touch(mode=0o755)
    link = tmp_path / host.PROGRAM
    link.symlink_to(other)
    for chosen in (other, link):
        with pytest.raises(HostCannot, match="named qemu-kvm"):
            host.program({"COPPICE_QEMU": str(chosen)})


def test_an_accelerator_that_qemu_does_not_have_is_refused_at_once() -> None:
    """It is refused at once, not at the first start of a machine."""
    with pytest.raises(UsageError, match="hvf"):
        QemuDriver("hvf")


async def test_a_version_is_queried_once_per_program_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later processes find the version in the cache until the file is replaced, so `coppice ls`
    does not query it. Without a cache it is queried.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    starts = tmp_path / "starts"

    async def asked(number: int) -> str:
        monkeypatch.setattr(program_files, "_versions", {})  # simulates a new process
        found = await host.version(str(program))
        assert len(starts.read_text().split()) == number
        return found

    def install(version: str) -> None:
        new = tmp_path / "new"
        new.write_text(f"#!/bin/sh\necho x >> {starts}\necho QEMU emulator version {version}\n")
        new.chmod(0o755)
        new.replace(program)

    program = tmp_path / "qemu"
    install("7.2.22")
    assert [await asked(1), await asked(1)] == ["7.2.22", "7.2.22"]
    install("7.2.23")
    assert [await asked(2), await asked(2)] == ["7.2.23", "7.2.23"]
    (tmp_path / "cache/coppice/vmm-versions.json").write_text("{")
    assert await asked(3) == "7.2.23"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert [await asked(4), await asked(5)] == ["7.2.23", "7.2.23"]
