"""The QEMU command line: relative paths only, and the same machine for a boot and for a restore."""

from __future__ import annotations

import re

import pytest

from coppice.errors import VmmError
from coppice.model import MIB, MachineSpec, Publish, VolumeDisk
from coppice.vmm import driver as files
from coppice.vmm.qemu import command
from coppice.vmm.qemu.ports import with_picked

MACHINE = MachineSpec(cpus=2, memory_bytes=256 * MIB, overlay_bytes=64 * MIB, kernel="k")
SOCKETS = {command.QMP_SOCKET: 10, **{files.PORT_SOCKET.format(port): 11 + port for port in range(files.PORTS)}}


DEBIAN_12 = (7, 2)


def machine(
    accel: str = "tcg",
    publish: tuple[Publish, ...] = (),
    run_as: int | None = None,
    spec: MachineSpec = MACHINE,
    release: tuple[int, int] = DEBIAN_12,
) -> list[str]:
    """The machine's part of the command line."""
    return command.machine_arguments(
        "qemu",
        release=release,
        accel=accel,
        cpu_model="max",
        machine=spec,
        mac="02:00:00:00:00:01",
        publish=publish,
        socket_fds=SOCKETS,
        run_as=run_as,
    )


def option(arguments: list[str], name: str) -> list[str]:
    """All values of an option."""
    return [arguments[at + 1] for at, word in enumerate(arguments) if word == name]


def test_no_path_leaves_the_directory() -> None:
    """A fork restores what its source saved in another directory: nothing on the line may name one (invariant 4)."""
    restored = machine() + command.restore_arguments(MACHINE, 30, DEBIAN_12)
    booted = machine() + command.boot_arguments(MACHINE, command.kernel_command_line("tcg", 1))
    for arguments in (booted, restored):
        assert not [word for word in arguments[1:] if "/" in word.replace("hostfwd", "")]
        assert not [word for word in arguments if ".." in word]


def test_a_boot_writes_into_its_file_and_a_restore_never_does() -> None:
    """RAM of a first boot is the file itself; a restore maps the captured one privately (invariant 1)."""
    (booted,) = option(command.boot_arguments(MACHINE, ""), "-object")
    (restored,) = option(command.restore_arguments(MACHINE, 30, DEBIAN_12), "-object")
    assert f"mem-path={files.LIVE_MEMORY}" in booted.split(",")
    assert "share=on" in booted.split(",")
    assert f"mem-path={files.MEMORY}" in restored.split(",")
    assert "share=off" in restored.split(",")
    for backend in (booted, restored):
        assert f"size={256 * MIB}" in backend.split(",")
        assert "id=ram" in backend.split(",")
    assert "memory-backend=ram" in command.MACHINE.split(",")


def test_the_machine_is_the_same_for_a_boot_and_a_restore() -> None:
    """What a vmstate is loaded into has the devices it was saved from; only RAM, kernel and the state differ."""
    different = {"-object", "-append", "-incoming", "-kernel", "-initrd"}
    for arguments in (command.boot_arguments(MACHINE, "x"), command.restore_arguments(MACHINE, 30, DEBIAN_12)):
        assert set(arguments[::2]) <= different
    assert option(command.restore_arguments(MACHINE, 30, DEBIAN_12), "-incoming") == ["fd:30"]


def test_every_agent_port_has_its_socket_and_its_number() -> None:
    """A port that moved would be another device to the vmstate and another name to the agent."""
    arguments = machine()
    for port in range(files.PORTS):
        fd = SOCKETS[files.PORT_SOCKET.format(port)]
        assert f"socket,id=port{port},fd={fd},server=on,wait=off" in option(arguments, "-chardev")
        assert f"virtserialport,chardev=port{port},name=coppice.{port},nr={port + 1}" in option(arguments, "-device")


def test_ports_are_published_as_asked() -> None:
    """Each rule once, on the address that was asked for, loopback by default."""
    rules = (
        Publish(host_port=8080, guest_port=80),
        Publish(host_port=53, guest_port=5353, protocol="udp", host_address="192.0.2.1"),
    )
    (network,) = option(machine(publish=rules), "-netdev")
    assert re.findall(r"hostfwd=([^,]+)", network) == ["tcp:127.0.0.1:8080-:80", "udp:192.0.2.1:53-:5353"]
    assert "hostfwd" not in option(machine(), "-netdev")[0]


def test_picked_ports_are_read_from_what_qemu_says() -> None:
    """Only from its own forwards, whatever connections the guest has open; a port that was asked for is never taken for one that was picked."""
    said = (
        "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
        "  TCP[ESTABLISHED]   14       10.0.2.15 40000       127.0.0.1    80     0     0\r\n"
        "  TCP[HOST_FORWARD]  11      127.66.7.8 42485       10.0.2.15    80     0     0\r\n"
        "  TCP[HOST_FORWARD]   9       127.0.0.1 33897       10.0.2.15    80     0     0\r\n"
        "  TCP[HOST_FORWARD]   3       127.0.0.1  8080       10.0.2.15    80     0     0\r\n"
        "  UDP[HOST_FORWARD]   8               * 37444       10.0.2.15    53     0     0\r\n"
    )
    asked = (
        Publish(host_port=8080, guest_port=80),
        Publish(host_port=0, guest_port=80),
        Publish(host_port=0, guest_port=80, host_address="127.66.7.8"),
        Publish(host_port=0, guest_port=53, protocol="udp", host_address="0.0.0.0"),  # noqa: S104 - only read
    )
    assert [port.host_port for port in with_picked(asked, said)] == [8080, 33897, 42485, 37444]
    with pytest.raises(VmmError):
        with_picked((*asked, Publish(host_port=0, guest_port=99)), said)


@pytest.mark.parametrize("port", [22, 0, 65536, 99999, 1023, 10**30])
def test_a_port_that_the_kernel_would_not_pick_is_no_answer(port: int) -> None:
    """A VMM that was taken over may say anything, and root would bind it at the next start."""
    said = f"  TCP[HOST_FORWARD]  11      127.0.0.1 {port}       10.0.2.15    80     0     0\n"
    with pytest.raises(VmmError):
        with_picked((Publish(host_port=0, guest_port=80),), said)


@pytest.mark.parametrize("run_as", [None, 1000])
def test_qemu_is_confined(run_as: int | None) -> None:
    """It starts no program, reads no configuration, and gives up root where it had it."""
    arguments = machine(run_as=run_as)
    (sandbox,) = option(arguments, "-sandbox")
    assert {"on", "spawn=deny", "resourcecontrol=deny", "obsolete=deny"} <= set(sandbox.split(","))
    assert option(arguments, "-runas") == ([] if run_as is None else ["1000:1000"])
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(arguments)


def test_a_newer_qemu_gives_up_root_by_its_new_option() -> None:
    """-runas is gone from QEMU 10: with it no machine would start."""
    arguments = machine(run_as=1000, release=(10, 0))
    assert option(arguments, "-run-with") == ["user=1000:1000"]
    assert not option(arguments, "-runas")
    assert option(machine(run_as=1000, release=(9, 0)), "-runas") == ["1000:1000"]


def test_a_newer_qemu_opens_the_mem_file_for_reading_only() -> None:
    """Where QEMU can, nobody who maps the mem-file holds it open for writing: a guest that broke out could not reach its siblings (invariant 1)."""
    (newer,) = option(command.restore_arguments(MACHINE, 30, (8, 2)), "-object")
    assert {"readonly=on", "rom=off", "share=off"} <= set(newer.split(","))
    (older,) = option(command.restore_arguments(MACHINE, 30, (8, 1)), "-object")
    assert "rom" not in older


def test_disks_are_what_they_are() -> None:
    """The root is read-only, since all forks share it; the overlay is not."""
    overlay, root = option(machine(), "-blockdev")
    assert f"file.filename={files.ROOT_DISK}" in root.split(",")
    assert "read-only=on" in root.split(",")
    assert f"file.filename={files.OVERLAY_DISK}" in overlay.split(",")
    assert "read-only=off" in overlay.split(",")


def test_the_size_of_the_machine_is_on_the_line() -> None:
    """CPUs and memory as the record has them."""
    arguments = machine()
    assert option(arguments, "-smp") == ["2"]
    assert option(arguments, "-m") == ["size=256M"]


def test_only_emulation_is_told_the_frequency_of_its_clock() -> None:
    """KVM has a clock of its own; under TCG the guest would calibrate in vain on a loaded host."""
    assert "tsc_early_khz=2596000" in command.kernel_command_line("tcg", 2_596_000).split()
    assert "tsc" not in command.kernel_command_line("kvm", 2_596_000)
    assert option(machine("kvm"), "-accel") == ["kvm"]
    assert option(machine("tcg"), "-accel")[0].startswith("tcg")


def test_volumes_are_disks_with_a_serial_number_and_readers_get_them_read_only() -> None:
    """The guest knows them by the number; a volume that is only read cannot be written by the VMM either, and none is named by a path elsewhere."""
    disks = tuple(
        VolumeDisk(volume_id="v" * 24, volume_name="data", size_bytes=MIB, mount_path=f"/{number}", readonly=readonly)
        for number, readonly in enumerate((False, True))
    )
    plain = machine()
    arguments = machine(
        spec=MachineSpec(cpus=2, memory_bytes=256 * MIB, overlay_bytes=64 * MIB, kernel="k", volumes=disks)
    )
    assert arguments[: len(plain)] == plain  # a machine without volumes is what it always was
    for number, mode in enumerate(("off", "on")):
        (node,) = [each for each in option(arguments, "-blockdev") if f"node-name=volume{number}" in each.split(",")]
        assert f"read-only={mode}" in node.split(",")
        assert f"file.filename=volume{number}.raw" in node.split(",")
        assert f"virtio-blk-device,drive=volume{number},serial=volume{number}" in option(arguments, "-device")
