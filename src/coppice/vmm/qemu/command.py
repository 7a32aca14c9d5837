"""The QEMU command line: one machine, the same for a first boot and for a restore, with relative paths only.

What a vmstate was saved from and what it is loaded into must agree in every device, so there is one function for both; only where
guest RAM comes from, and whether there is a kernel to run, differs.
"""

from __future__ import annotations

from coppice.model import MachineSpec, Publish, VolumeDisk
from coppice.vmm import driver as files

# microvm: no PCI, no option ROMs. acpi=on: Debian's kernel has no virtio_mmio.device= parameter and finds the devices through ACPI, so the words that
# QEMU would append to the kernel command line are useless. rtc=on: without a CMOS clock the kernel waits 2 s for one. pit and pic stay on: without
# them the kernel has nothing to calibrate against. suppress-vmdesc: the device state is saved without the JSON description that the loader would miss.
MACHINE = "microvm,acpi=on,auto-kernel-cmdline=off,x-option-roms=off,rtc=on,isa-serial=on,suppress-vmdesc=on,memory-backend=ram"
QMP_SOCKET = "qmp.sock"

# Releases of QEMU from which on it is done in another way (docs/system: "Deprecated features", "Removed features"; qapi/qom.json).
READ_ONLY_RAM = (
    8,
    2,
)  # memory-backend-file has rom=: a file that is open for reading only can be RAM that the guest writes to
RUN_WITH_USER = (9, 1)  # -run-with user= takes the place of -runas, which 10.0 has no more

# quiet: each line on an emulated serial port costs milliseconds. panic=-1 with -no-reboot: a panic ends the VMM. cryptomgr.notests: 0.25 s under TCG.
_KERNEL_WORDS = ("console=ttyS0", "quiet", "panic=-1", "reboot=t", "random.trust_cpu=on", "cryptomgr.notests")


def kernel_command_line(accel: str, tsc_khz: int) -> str:
    """Kernel command line for a first boot.

    Under TCG the guest's time-stamp counter is the host's own, and calibrating it against an emulated timer fails on a
    loaded host; so the kernel is told the frequency. KVM has its own clock.
    """
    words = list(_KERNEL_WORDS)
    if accel == "tcg":
        # reliable: the emulated CPU does not say that its counter is invariant, and the kernel would keep time by counting ticks, which a
        # loaded host loses.
        words += [f"tsc_early_khz={tsc_khz}", "tsc=reliable"]
        words += [
            "psi=0"
        ]  # pressure accounting in every context switch: a twentieth of the code that a fork has to translate
    return " ".join(words)


def machine_arguments(
    executable: str,
    *,
    release: tuple[int, int],
    accel: str,
    cpu_model: str,
    machine: MachineSpec,
    mac: str,
    publish: tuple[Publish, ...],
    socket_fds: dict[str, int],
    run_as: int | None,
) -> list[str]:
    """The part of the command line that a vmstate depends on. `socket_fds` has a listening socket for each socket name.

    `release` is QEMU's own, major and minor number: some options are spelt anew.

    With `run_as` QEMU gives up root for that user once it has opened its files, and can open no other afterwards.
    """
    accelerator = "tcg,thread=multi" if accel == "tcg" else accel
    arguments = [
        executable, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-name", "coppice", "-M", MACHINE, "-accel", accelerator, "-cpu", cpu_model,
        "-smp", str(machine.cpus), "-m", f"size={machine.memory_bytes // (1 << 20)}M",
        # To give up root QEMU must be let change its user; having done so it cannot again, nor can it start a program.
        "-sandbox", f"on,obsolete=deny,elevateprivileges={'deny' if run_as is None else 'allow'},spawn=deny,resourcecontrol=deny",
        *(() if run_as is None else _run_as(run_as, release)),
        "-chardev", f"socket,id=qmp,fd={socket_fds[QMP_SOCKET]},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        # The device state carries no configuration section: it is saved alone, without RAM.
        "-global", "migration.send-configuration=off",
        "-chardev", f"file,id=console,path={files.CONSOLE_LOG},append=on", "-serial", "chardev:console",
        "-device", "virtio-serial-device,max_ports=16",
    ]  # fmt: skip
    for port in range(files.PORTS):
        name = files.PORT_SOCKET.format(port)
        arguments += [
            "-chardev", f"socket,id=port{port},fd={socket_fds[name]},server=on,wait=off",
            "-device", f"virtserialport,chardev=port{port},name=coppice.{port},nr={port + 1}",
        ]  # fmt: skip
    forwards = "".join(
        f",hostfwd={rule.protocol}:{rule.host_address}:{rule.host_port}-:{rule.guest_port}" for rule in publish
    )
    arguments += [
        "-netdev", f"user,id=net0{forwards}", "-device", f"virtio-net-device,netdev=net0,guest_announce=off,mac={mac}",
        *_disk("overlay", files.OVERLAY_DISK, read_only=False),
        *_disk("root", files.ROOT_DISK, read_only=True),
        *(word for number, disk in enumerate(machine.volumes) for word in _volume(number, disk)),
    ]  # fmt: skip
    return arguments


def _run_as(user: int, release: tuple[int, int]) -> tuple[str, str]:
    return ("-run-with", f"user={user}:{user}") if release >= RUN_WITH_USER else ("-runas", f"{user}:{user}")


def _disk(name: str, path: str, *, read_only: bool) -> list[str]:
    """A raw disk through the page cache. A read-only one takes no lock: all forks have a link to the same file."""
    node = f"driver=raw,node-name={name},read-only={'on' if read_only else 'off'},discard=unmap"
    node += f",file.driver=file,file.filename={path},file.locking=off"
    return ["-blockdev", node, "-device", f"virtio-blk-device,drive={name},serial={name}"]


def _volume(number: int, disk: VolumeDisk) -> list[str]:
    """The guest knows it by its serial number: what is on it was written by other guests, and is not to be believed."""
    return _disk(f"volume{number}", files.VOLUME_DISK.format(number), read_only=disk.readonly)


def boot_arguments(machine: MachineSpec, command_line: str) -> list[str]:
    """First boot: guest RAM *is* the file, so a capture has no RAM to write."""
    return [
        "-object", _memory(machine, files.LIVE_MEMORY, share=True),
        "-kernel", files.KERNEL, "-initrd", files.INITRD, "-append", command_line,
    ]  # fmt: skip


def restore_arguments(
    machine: MachineSpec, vmstate_fd: int, release: tuple[int, int], *, paused: bool = False
) -> list[str]:
    """Restore: the mem-file is mapped MAP_PRIVATE; kernel and initrd are stubs, since nothing ever reads them.

    QEMU opens the mem-file for reading only, where its release can: then not even a guest that has broken out of it can write to what
    all forks share.
    """
    read_only = ",readonly=on,rom=off" if release >= READ_ONLY_RAM else ""
    return [
        "-object", _memory(machine, files.MEMORY, share=False) + read_only,
        "-kernel", files.KERNEL, "-initrd", files.INITRD, "-append", "",
        "-incoming", f"fd:{vmstate_fd}",
        *(["-S"] if paused else []),
    ]  # fmt: skip


def _memory(machine: MachineSpec, path: str, *, share: bool) -> str:
    return f"memory-backend-file,id=ram,size={machine.memory_bytes},mem-path={path},share={'on' if share else 'off'}"
