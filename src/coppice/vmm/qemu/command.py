"""The QEMU command line, with relative paths only.

The machine that a vmstate is loaded into must have the same devices as the saved one. So boot and
restore share one function; they differ only in the source of guest RAM and in the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coppice.errors import NotSupported
from coppice.model import MIB, MachineSpec
from coppice.model.network import Nic, NicBackend
from coppice.vmm import driver as files
from coppice.vmm.driver import Disk
from coppice.vmm.qemu import releases
from coppice.vmm.qemu.releases import Release

# How the kernel finds the machine's devices. Debian's kernel finds them through ACPI, since it has
# no virtio_mmio.device= parameter. QEMU appends this parameter to the command line for a kernel
# without ACPI.
_BY_ACPI = "acpi=on,auto-kernel-cmdline=off"
_BY_COMMAND_LINE = "acpi=off,auto-kernel-cmdline=on"
# microvm: no PCI, no option ROMs. rtc=on: without a CMOS clock the kernel waits 2 s for one. pit
# and pic stay on: the kernel calibrates against them. suppress-vmdesc: no JSON description in the
# device state.
_MACHINE = "microvm,{devices},x-option-roms=off,rtc=on,isa-serial=on,suppress-vmdesc=on,memory-backend=ram"
_BUSES_WITHOUT_ACPI = 8  # virtio-mmio; with ACPI there are 24
QMP_SOCKET = "qmp.sock"
PORT_SOCKET = "port{}.sock"


def kernel_command_line(accel: str, tsc_khz: int) -> str:
    """Return the kernel command line for a first boot.

    Under TCG the guest's time-stamp counter is the host's own. Calibrating it against an emulated
    timer fails on a loaded host, so the command line gives the frequency. KVM has its own clock.
    """
    words = [*files.KERNEL_WORDS, "reboot=t"]  # by a triple fault, which ends QEMU with -no-reboot
    if accel == "tcg":
        # tsc=reliable: the emulated CPU does not declare its counter invariant, so the kernel would
        # count ticks instead, which a loaded host loses. psi=0: pressure accounting in every
        # context switch is a twentieth of the code that a fork has to translate.
        words += [f"tsc_early_khz={tsc_khz}", "tsc=reliable", "psi=0"]
    return " ".join(words)


def machine_type(machine: MachineSpec) -> str:
    """Return the value of `-M`. It is in the manifest: captures load only into the same type."""
    return _MACHINE.format(devices=_BY_ACPI if machine.acpi else _BY_COMMAND_LINE)


def translation_bytes(machine: MachineSpec) -> int:
    """Return the most memory that QEMU may use for translated guest code.

    QEMU's own limit is an eighth of the host's memory, up to 1 GiB, and a busy guest fills it: 250
    MiB in a minute of numpy, perl and apt. With 32 MiB the same work took the same CPU time, though
    the code is translated again whenever the buffer is full.
    """
    return min(max(machine.memory_bytes // 8, 32 * MIB), 256 * MIB)


def require_buses(machine: MachineSpec, devices: int) -> None:
    """Refuse a machine with more devices than buses.

    :param devices: the number of its disks and NICs
    :raises NotSupported: it has too many; the message says how many volumes are possible
    """
    excess = 1 + devices - _BUSES_WITHOUT_ACPI  # one bus is for the agent's ports
    if not machine.acpi and excess > 0:
        raise NotSupported(
            f"a machine whose kernel has no ACPI cannot have {len(machine.volumes)} volumes",
            hint=f"attach {len(machine.volumes) - excess}, or run with a kernel that has ACPI",
        )


def machine_arguments(
    executable: str,
    *,
    release: Release,
    accel: str,
    cpu_model: str,
    machine: MachineSpec,
    disks: Sequence[Disk],
    nics: tuple[Nic, ...],
    socket_fds: dict[str, int],
    nic_fds: Mapping[Nic, int] = {},
    run_as: int | None,
) -> list[str]:
    """Return the part of the command line that a vmstate depends on.

    :param release: the release of `executable`: some options differ (see `releases`)
    :param socket_fds: a listening socket for each socket name
    :param nic_fds: the open TAP, or the socket of the helper, of each NIC that has one
    :param run_as: the user that QEMU drops root to, after opening its files; it can open no others
    """
    accelerator = f"tcg,thread=multi,tb-size={translation_bytes(machine) // MIB}" if accel == "tcg" else accel
    arguments = [
        executable, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-name", "coppice", "-M", machine_type(machine), "-accel", accelerator, "-cpu", cpu_model,
        "-smp", str(machine.cpus), "-m", f"size={machine.memory_bytes // (1 << 20)}M",
        # Dropping root needs a permitted change of user. Afterwards QEMU can neither change it
        # again nor start a program.
        "-sandbox", f"on,obsolete=deny,elevateprivileges={'deny' if run_as is None else 'allow'},spawn=deny,resourcecontrol=deny",
        *(() if run_as is None else releases.run_as(release, run_as)),
        "-chardev", f"socket,id=qmp,fd={socket_fds[QMP_SOCKET]},server=on,wait=off",
        *releases.monitor(release, "qmp"),
        # The device state is saved alone, without RAM, so it has no configuration section.
        "-global", "migration.send-configuration=off",
        "-chardev", f"file,id=console,path={files.CONSOLE_LOG},append=on", "-serial", "chardev:console",
        "-device", "virtio-serial-device,max_ports=16",
    ]  # fmt: skip
    for port in range(files.PORTS):
        name = PORT_SOCKET.format(port)
        arguments += [
            "-chardev", f"socket,id=port{port},fd={socket_fds[name]},server=on,wait=off",
            "-device", f"virtserialport,chardev=port{port},name=coppice.{port},nr={port + 1}",
        ]  # fmt: skip
    arguments += [
        *(word for number, nic in enumerate(nics) for word in _nic(number, nic, nic_fds.get(nic, -1))),
        *(word for disk in disks for word in _disk(disk)),
    ]  # fmt: skip
    return arguments


def _nic(number: int, nic: Nic, descriptor: int) -> list[str]:
    """Return a NIC and its backend. It sends no announcement after a restore."""
    backend = {
        NicBackend.USER_MODE: _user_mode(nic),
        NicBackend.TAP: f"tap,fd={descriptor},vhost=off",
        NicBackend.STREAM: f"stream,server=off,addr.type=fd,addr.str={descriptor}",
    }[nic.backend]
    return [
        "-netdev", f"{backend},id=net{number}",
        "-device", f"virtio-net-device,netdev=net{number},guest_announce=off,mac={nic.mac}",
    ]  # fmt: skip


def _user_mode(nic: Nic) -> str:
    return "user" + "".join(
        f",hostfwd={rule.protocol}:{rule.host_address}:{rule.host_port}-:{rule.guest_port}" for rule in nic.forwards
    )


def _disk(disk: Disk) -> list[str]:
    """Return a disk through the page cache, without a lock: forks link to the same files.

    The whole chain of its layers is given here, so QEMU follows no name in a layer's header. Each
    node has the name of its file: so QEMU can report the file that it writes to.
    """
    node = "discard=unmap"
    above = ""
    for path in (disk.path, *reversed(disk.below)):
        readonly = "on" if disk.readonly or above else "off"
        layered = disk.below and path != disk.below[0]
        node += f",{above}node-name={path},{above}driver={'qcow2' if layered else 'raw'},{above}read-only={readonly}"
        node += f",{above}file.driver=file,{above}file.filename={path},{above}file.locking=off"
        node += f",{above}file.read-only=on" if above else ""
        above += "backing."
    return ["-blockdev", node, "-device", f"virtio-blk-device,drive={disk.path},serial={disk.serial}"]


def boot_arguments(machine: MachineSpec, command_line: str) -> list[str]:
    """Return the arguments of a first boot. Guest RAM *is* the file, so a capture writes none."""
    return [
        "-object", _memory(machine, files.LIVE_MEMORY, share=True),
        "-kernel", files.KERNEL, "-initrd", files.INITRD, "-append", command_line,
    ]  # fmt: skip


def restore_arguments(
    machine: MachineSpec, vmstate_fd: int | None, release: Release, *, paused: bool = False
) -> list[str]:
    """Return the arguments of a restore. The mem-file is mapped MAP_PRIVATE; nothing reads the
    kernel and initrd.

    :param vmstate_fd: an open vmstate, if the release cannot open the file itself
        (`releases.INCOMING_FILE`)
    """
    return [
        "-object", _memory(machine, files.MEMORY, share=False) + releases.private_memory(release),
        "-kernel", files.KERNEL, "-initrd", files.INITRD, "-append", "",
        "-incoming", releases.incoming(vmstate_fd),
        *(["-S"] if paused else []),
    ]  # fmt: skip


def _memory(machine: MachineSpec, path: str, *, share: bool) -> str:
    return f"memory-backend-file,id=ram,size={machine.memory_bytes},mem-path={path},share={'on' if share else 'off'}"
