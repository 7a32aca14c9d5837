"""Kernels of microVMs: uncompressed ELF files with built-in drivers and without ACPI. Missing
options are known before a start.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from coppice.boot.config import Configuration, embedded_config, parse_config
from coppice.boot.kernel import KernelStore
from coppice.errors import NotSupported, UsageError
from coppice.machine import guest_kernel
from coppice.model import MIB, MachineSpec, VolumeDisk
from coppice.model.network import NicBackend
from coppice.vmm.driver import AgentDevice, Capabilities
from coppice.vmm.qemu import command
from kernel_files import RELEASE, bzimage, module_tree, vmlinux

BUILT_IN = (
    *("BLK_DEV_INITRD", "DEVTMPFS", "TMPFS", "VIRTIO_MMIO", "VIRTIO_BLK", "EXT4_FS", "OVERLAY_FS", "EROFS_FS"),
    *("VIRTIO_CONSOLE", "VIRTIO_VSOCKETS", "VIRTIO_MMIO_CMDLINE_DEVICES", "VIRTIO_NET", "INET", "SMP", "KVM_GUEST"),
)
QEMU = Capabilities(
    maps_mem_file_privately=True,
    maps_layers=True,
    observable=False,
    boots_in_file=True,
    restores_paused=True,
    nic_backends=frozenset({NicBackend.USER_MODE}),
    enters_by_pvh=True,
)


def config(*without: str, acpi: bool = False) -> str:
    """Return the .config of a kernel with all options that a guest needs, except some."""
    options = [*BUILT_IN, *(["ACPI"] if acpi else [])]
    lines = [f"# CONFIG_{name} is not set" if name in without else f"CONFIG_{name}=y" for name in options]
    return "\n".join(["# Linux/x86 Kernel Configuration", *lines, 'CONFIG_CMDLINE="quiet"', ""])


def elf(embedded: str | None = None, *, pvh: bool = True, banner: bool = True) -> bytes:
    """Return an uncompressed kernel, with an embedded configuration if one is given."""
    image = bytearray(vmlinux(note_type=18 if pvh else 17))
    struct.pack_into("<H", image, 18, 62)
    if banner:
        image += b"Linux version %s \0" + f"Linux version {RELEASE} (builder@host) (gcc) #1 SMP\0".encode()
    if embedded is not None:
        image += b"IKCFG_ST" + gzip.compress(embedded.encode()) + b"IKCFG_ED"
    return bytes(image)


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(tmp_path / "kernels")


def placed(directory: Path, contents: bytes | str, name: str = "vmlinux") -> Path:
    """Write a file with these contents."""
    path = directory / name
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


def test_a_kernel_that_carries_its_configuration_needs_no_flags(store: KernelStore, tmp_path: Path) -> None:
    """Version, ACPI and options are read from the file; a VMM that only restores gets a small stub
    with a header.
    """
    kernel = store.add(placed(tmp_path, elf(config())))
    assert (kernel.version, kernel.acpi, kernel.pvh, kernel.modules, kernel.vmlinuz) == (
        RELEASE,
        False,
        True,
        None,
        None,
    )
    assert kernel.vmlinux is not None
    assert kernel.boot_image == kernel.vmlinux
    assert kernel.config is not None
    assert kernel.config.read_text() == config()
    stub, _ = store.stub(kernel.key)
    assert stub.stat().st_size == 64 << 10
    assert stub.read_bytes()[0x202:0x206] == b"HdrS"
    assert store.get(kernel.key) == kernel == store.add(placed(tmp_path, elf(config()), "again"))
    assert store.add(placed(tmp_path, elf(config(acpi=True)), "other")).acpi


def test_properties_that_the_file_lacks_are_given(store: KernelStore, tmp_path: Path) -> None:
    """A configuration file or flags supply missing properties; an error for others names the
    options to type.
    """
    image = placed(tmp_path, elf())
    with pytest.raises(UsageError, match="built in") as caught:
        store.add(image)
    assert "--no-modules" in str(caught.value.hint)
    with pytest.raises(UsageError, match="ACPI") as caught:
        store.add(image, no_modules=True)
    assert "--no-acpi" in str(caught.value.hint)
    flagged = store.add(image, no_modules=True, acpi=False)
    assert (flagged.acpi, flagged.config) == (False, None)
    configured = store.add(image, config=placed(tmp_path, config(), ".config"))
    assert (configured.acpi, configured.config_from) == (False, "the file given with --config")
    with_modules = store.add(image, module_tree(tmp_path / "modules"), acpi=True)
    assert with_modules.acpi
    assert with_modules.modules is not None


@pytest.mark.parametrize(
    ("embedded", "given", "acpi", "part"),
    [
        (config(), config("SMP"), None, "another configuration"),
        (config(), None, True, "has no ACPI"),
        (config(acpi=True), None, False, "has ACPI"),
        (config("VIRTIO_MMIO_CMDLINE_DEVICES"), None, None, "cannot find its devices"),
        (None, "no options at all", None, "not a kernel configuration"),
    ],
)
def test_contradictions_are_refused(
    store: KernelStore, tmp_path: Path, embedded: str | None, given: str | None, acpi: bool | None, part: str
) -> None:
    """A wrong flag would show only as a guest that finds no disk, so it is refused and nothing is
    stored.
    """
    file = None if given is None else placed(tmp_path, given, ".config")
    with pytest.raises(UsageError, match=part):
        store.add(placed(tmp_path, elf(embedded)), config=file, no_modules=True, acpi=acpi)
    assert store.kernels() == []


@pytest.mark.parametrize("image", [elf(banner=False), b"\x7fELF\x01\x01" + bytes(200), b"\x7fELF", b"", b"MZ" * 90_000])
def test_other_elf_files_are_refused(store: KernelStore, tmp_path: Path, image: bytes) -> None:
    """An ELF file of another kind, or a malformed one, is refused when it is added instead of
    failing to boot.
    """
    with pytest.raises(UsageError):
        store.add(placed(tmp_path, image), no_modules=True, acpi=False)


def test_a_damaged_configuration_is_ignored() -> None:
    """An incomplete gzip stream gives no configuration."""
    assert embedded_config(elf()) is None
    assert embedded_config(b"IKCFG_ST\x1f\x8bgarbage") is None
    assert parse_config('CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\nCONFIG_D="y"\n') == {"A": "y", "C": "m"}


def test_a_bzimage_may_carry_its_configuration_too(store: KernelStore, tmp_path: Path) -> None:
    """A bzImage with a configuration needs neither modules nor flags; one without is assumed to
    have ACPI, like the kernels of distributions.
    """
    carrying = bzimage(gzip.compress(elf(config()), mtime=0))
    kernel = store.add(placed(tmp_path, carrying, "bzImage"))
    assert (kernel.acpi, kernel.config_from) == (False, "the kernel itself")
    assert kernel.vmlinuz is not None
    silent = store.add(placed(tmp_path, bzimage(), "silent"), no_modules=True)
    assert silent.acpi


@pytest.mark.parametrize(
    ("option", "machine", "accel"),
    [
        *((option, MachineSpec(acpi=False), "tcg") for option in BUILT_IN[:9]),
        ("VIRTIO_NET", MachineSpec(acpi=False), "tcg"),
        ("SMP", MachineSpec(acpi=False, cpus=2), "tcg"),
        ("KVM_GUEST", MachineSpec(acpi=False), "kvm"),
    ],
)
def test_missing_options_are_reported_before_the_start(
    store: KernelStore, tmp_path: Path, option: str, machine: MachineSpec, accel: str
) -> None:
    """The error names each missing option and its source; a machine that does not need the option
    starts.
    """
    complete = store.add(placed(tmp_path, elf(config())))
    guest_kernel.require(complete, machine, QEMU, accel=accel, has_nic=True)
    kernel = store.add(placed(tmp_path, elf(config(option))))
    with pytest.raises(UsageError, match=rf"CONFIG_{option} \(.*the kernel itself"):
        guest_kernel.require(kernel, machine, QEMU, accel=accel, has_nic=True)
    if option in ("VIRTIO_NET", "SMP", "KVM_GUEST"):
        guest_kernel.require(kernel, MachineSpec(acpi=False), QEMU, accel="tcg", has_nic=False)


def test_needs_follow_the_vmm(store: KernelStore, tmp_path: Path) -> None:
    """The VMM defines the agent's device and the entry point; a VMM that needs neither accepts the
    kernel.
    """
    kernel = store.add(placed(tmp_path, elf(config("VIRTIO_CONSOLE"), pvh=False)))
    machine = MachineSpec(acpi=False)
    with pytest.raises(UsageError, match="CONFIG_PVH"):
        guest_kernel.require(kernel, machine, QEMU, accel="tcg", has_nic=True)
    vsock = Capabilities(
        maps_mem_file_privately=True,
        maps_layers=True,
        observable=False,
        boots_in_file=False,
        restores_paused=True,
        nic_backends=frozenset(),
        agent_device=AgentDevice.VSOCK,
    )
    guest_kernel.require(kernel, machine, vsock, accel="kvm", has_nic=True)


def test_modules_count_only_with_their_files(tmp_path: Path) -> None:
    """`=m` without a directory of modules counts as missing; a directory alone shows which modules
    exist; unlisted options are unknown.
    """
    from coppice.boot.config import EROFS, EXT4, SMP, VIRTIO_NET
    from coppice.boot.modules import ModuleTree

    tree = ModuleTree(module_tree(tmp_path / "modules"))
    assert Configuration({"EROFS_FS": "m"}, None).has(EROFS) is False
    assert Configuration({"EROFS_FS": "m"}, tree).has(EROFS) is True
    assert Configuration({}, tree).has(EROFS) is False
    alone = Configuration(None, tree)
    assert (alone.has(EROFS), alone.has(EXT4), alone.has(VIRTIO_NET), alone.has(SMP)) == (True, True, False, None)
    assert Configuration(None, None).has(EROFS) is None


def test_devices_are_on_the_command_line_of_a_kernel_without_acpi() -> None:
    """The machine type is part of the manifest, because a capture of one type does not load into
    the other.
    """
    with_acpi, without = (command.machine_type(MachineSpec(acpi=acpi)).split(",") for acpi in (True, False))
    assert {"acpi=on", "auto-kernel-cmdline=off"} <= set(with_acpi)
    assert {"acpi=off", "auto-kernel-cmdline=on"} <= set(without)
    # Captures of earlier versions have this type in their manifests.
    old = "microvm,acpi=on,auto-kernel-cmdline=off,x-option-roms=off,rtc=on,isa-serial=on,suppress-vmdesc=on,memory-backend=ram"
    assert ",".join(with_acpi) == old


def test_more_devices_than_buses_are_refused() -> None:
    """Without ACPI QEMU's machine has 8 buses: the error gives the largest number of volumes."""
    disk = VolumeDisk(volume_id="v", volume_name="v", size_bytes=MIB, mount_path="/v", readonly=True)
    four = MachineSpec(acpi=False, volumes=(disk,) * 4)
    five = MachineSpec(acpi=False, volumes=(disk,) * 5)
    command.require_buses(four, 2 + 1 + 4)
    with pytest.raises(NotSupported, match="5 volumes") as caught:
        command.require_buses(five, 2 + 1 + 5)
    assert "attach 4" in str(caught.value.hint)
    command.require_buses(MachineSpec(volumes=(disk,) * 8), 2 + 1 + 8)
