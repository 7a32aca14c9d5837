"""The QEMU command line has only relative paths, and describes the same machine for a boot and for
a restore.
"""

from __future__ import annotations

import re

import msgspec
import pytest

from coppice.machine import directory as directories
from coppice.model import GIB, MIB, MachineSpec, Publish, VolumeDisk
from coppice.model.network import Nic, NicBackend
from coppice.vmm import driver as files
from coppice.vmm.qemu import command, releases

MACHINE = MachineSpec(cpus=2, memory_bytes=256 * MIB, overlay_bytes=64 * MIB, kernel="k")
SOCKETS = {command.QMP_SOCKET: 10, **{command.PORT_SOCKET.format(port): 11 + port for port in range(files.PORTS)}}


NIC = Nic(backend=NicBackend.USER_MODE, mac="02:00:00:00:00:01")
DEBIAN_12 = (7, 2)


def machine(
    accel: str = "tcg",
    nics: tuple[Nic, ...] = (NIC,),
    nic_fds: dict[Nic, int] | None = None,
    run_as: int | None = None,
    spec: MachineSpec = MACHINE,
    release: tuple[int, int] = DEBIAN_12,
) -> list[str]:
    """Return the machine's part of the command line."""
    return command.machine_arguments(
        "qemu",
        release=release,
        accel=accel,
        cpu_model="max",
        machine=spec,
        disks=directories.devices(spec),
        nics=nics,
        nic_fds=nic_fds or {},
        socket_fds=SOCKETS,
        run_as=run_as,
    )


def option(arguments: list[str], name: str) -> list[str]:
    """Return all values of an option."""
    return [arguments[at + 1] for at, word in enumerate(arguments) if word == name]


def test_no_path_leaves_the_directory() -> None:
    """A fork restores a state that its source saved in another directory, so no option may name a
    directory (invariant 4).
    """
    restored = machine() + command.restore_arguments(MACHINE, 30, DEBIAN_12)
    booted = machine() + command.boot_arguments(MACHINE, command.kernel_command_line("tcg", 1))
    for arguments in (booted, restored):
        assert not [word for word in arguments[1:] if "/" in word.replace("hostfwd", "")]
        assert not [word for word in arguments if ".." in word]


def test_a_boot_writes_into_its_file_and_a_restore_never_does() -> None:
    """RAM of a first boot is the mem-file itself; a restore maps the captured file privately
    (invariant 1).
    """
    (booted,) = option(command.boot_arguments(MACHINE, ""), "-object")
    (restored,) = option(command.restore_arguments(MACHINE, 30, DEBIAN_12), "-object")
    assert f"mem-path={files.LIVE_MEMORY}" in booted.split(",")
    assert "share=on" in booted.split(",")
    assert f"mem-path={files.MEMORY}" in restored.split(",")
    assert "share=off" in restored.split(",")
    for backend in (booted, restored):
        assert f"size={256 * MIB}" in backend.split(",")
        assert "id=ram" in backend.split(",")
    assert "memory-backend=ram" in command.machine_type(MACHINE).split(",")


def test_the_machine_is_the_same_for_a_boot_and_a_restore() -> None:
    """A restored machine has the devices of the saved one; only RAM, kernel and the state differ."""
    different = {"-object", "-append", "-incoming", "-kernel", "-initrd"}
    for arguments in (command.boot_arguments(MACHINE, "x"), command.restore_arguments(MACHINE, 30, DEBIAN_12)):
        assert set(arguments[::2]) <= different
    assert option(command.restore_arguments(MACHINE, 30, DEBIAN_12), "-incoming") == ["fd:30"]


def test_every_agent_port_has_its_socket_and_its_number() -> None:
    """A port with another number would be a different device for the vmstate and a different name
    for the agent.
    """
    arguments = machine()
    for port in range(files.PORTS):
        fd = SOCKETS[command.PORT_SOCKET.format(port)]
        assert f"socket,id=port{port},fd={fd},server=on,wait=off" in option(arguments, "-chardev")
        assert f"virtserialport,chardev=port{port},name=coppice.{port},nr={port + 1}" in option(arguments, "-device")


def test_ports_are_published_as_requested() -> None:
    """Each rule appears once, on the requested address or on loopback."""
    rules = (
        Publish(host_port=8080, guest_port=80),
        Publish(host_port=53, guest_port=5353, protocol="udp", host_address="192.0.2.1"),
    )
    (network,) = option(machine(nics=(msgspec.structs.replace(NIC, forwards=rules),)), "-netdev")
    assert re.findall(r"hostfwd=([^,]+)", network) == [
        "tcp:127.0.0.1:8080-:80",
        "udp:192.0.2.1:53-:5353",
    ]
    assert "hostfwd" not in option(machine(), "-netdev")[0]


def test_a_machine_without_a_network_has_no_nic() -> None:
    """The machine has neither the card nor its backend; the other devices are the same and in the
    same order, as a vmstate requires.
    """
    without, connected = machine(nics=()), machine()
    assert not option(without, "-netdev")
    assert not [word for word in without if "net" in word]
    at = connected.index("-netdev")
    assert without == connected[:at] + connected[at + 4 :]


def test_a_tap_is_inherited_open() -> None:
    """QEMU gets an open descriptor, because it can neither open the device nor enter its namespace.
    The forward rules are not QEMU's.
    """
    nic = Nic(backend=NicBackend.TAP, mac=NIC.mac, tap="tap0", namespace="/run/netns/x")
    line = machine(nics=(nic,), nic_fds={nic: 17})
    assert option(line, "-netdev") == ["tap,fd=17,vhost=off,id=net0"]
    assert "/run/netns/x" not in " ".join(line)


def test_the_socket_of_a_helper_is_inherited() -> None:
    """QEMU does not start the helper, and gets none of its words."""
    nic = Nic(backend=NicBackend.STREAM, mac=NIC.mac, helper=("passt", "--fd"))
    line = machine(nics=(nic,), nic_fds={nic: 17})
    assert option(line, "-netdev") == ["stream,server=off,addr.type=fd,addr.str=17,id=net0"]
    assert "passt" not in " ".join(line)


@pytest.mark.parametrize("run_as", [None, 1000])
def test_qemu_is_confined(run_as: int | None) -> None:
    """QEMU starts no program, reads no configuration, and gives up root if it has it."""
    arguments = machine(run_as=run_as)
    (sandbox,) = option(arguments, "-sandbox")
    assert {"on", "spawn=deny", "resourcecontrol=deny", "obsolete=deny"} <= set(sandbox.split(","))
    assert option(arguments, "-runas") == ([] if run_as is None else ["1000:1000"])
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(arguments)


def test_a_newer_qemu_gives_up_root_with_its_new_option() -> None:
    """QEMU 10 has no -runas, and would not start with it."""
    arguments = machine(run_as=1000, release=(10, 0))
    assert option(arguments, "-run-with") == ["user=1000:1000"]
    assert not option(arguments, "-runas")
    assert option(machine(run_as=1000, release=(9, 0)), "-runas") == ["1000:1000"]


def test_a_newer_qemu_opens_the_mem_file_for_reading_only() -> None:
    """If QEMU supports it, a process that maps the mem-file has it open read-only: an escaped guest
    could not reach its siblings (invariant 1).
    """
    (newer,) = option(command.restore_arguments(MACHINE, None, (8, 2)), "-object")
    assert {"readonly=on", "rom=off", "share=off"} <= set(newer.split(","))
    (older,) = option(command.restore_arguments(MACHINE, 30, (8, 1)), "-object")
    assert "rom" not in older


@pytest.mark.parametrize(
    ("release", "descriptor", "source"), [((7, 2), 30, "fd:30"), ((8, 1), 30, "fd:30"), ((8, 2), None, "file:vmstate")]
)
def test_a_newer_qemu_opens_the_device_state_itself(
    release: tuple[int, int], descriptor: int | None, source: str
) -> None:
    """From 9.1 on a plain file behind `fd:` is deprecated, and QEMU 11 refuses it, so no fork would
    start.
    """
    assert releases.opens_vmstate(release) == (descriptor is None)
    arguments = command.restore_arguments(MACHINE, descriptor, release)
    assert option(arguments, "-incoming") == [source]


def test_a_newer_qemu_has_its_monitor_as_an_object() -> None:
    """-mon is deprecated in QEMU 11.1."""
    assert option(machine(release=(11, 1)), "-object") == ["monitor-qmp,id=monitor,chardev=qmp"]
    assert not option(machine(release=(11, 1)), "-mon")
    assert option(machine(release=(11, 0)), "-mon") == ["chardev=qmp,mode=control"]


# The options among those that Coppice has ever used that QEMU's manual lists under "Deprecated
# features" and "Removed features", 8.0 to 11.1.
DEPRECATED = {(9, 1): ("-runas", "fd:"), (11, 1): ("-mon",)}


@pytest.mark.parametrize(
    "release", [(7, 2), (8, 0), (8, 2), (9, 0), (9, 1), (9, 2), (10, 0), (10, 2), (11, 0), (11, 1)]
)
def test_no_release_is_given_an_option_that_it_deprecates(release: tuple[int, int]) -> None:
    """A deprecated option gives a warning in one release and an error two releases later."""
    descriptor = None if releases.opens_vmstate(release) else 30
    line = machine(run_as=1000, release=release) + command.restore_arguments(MACHINE, descriptor, release)
    for since, words in DEPRECATED.items():
        if release >= since:
            assert not [word for word in line if word.startswith(words)]


def test_only_the_overlay_is_writable() -> None:
    """The root disk is read-only, because all forks share it; the overlay is writable."""
    overlay, root = option(machine(), "-blockdev")
    assert f"file.filename={files.ROOT_DISK}" in root.split(",")
    assert "read-only=on" in root.split(",")
    assert f"file.filename={files.OVERLAY_DISK}" in overlay.split(",")
    assert "read-only=off" in overlay.split(",")


def test_the_machines_size_is_on_the_command_line() -> None:
    """CPUs and memory are those of the record."""
    arguments = machine()
    assert option(arguments, "-smp") == ["2"]
    assert option(arguments, "-m") == ["size=256M"]


def test_only_emulation_sets_the_clock_frequency() -> None:
    """KVM has its own clock; under TCG a guest on a loaded host would calibrate wrongly."""
    assert "tsc_early_khz=2596000" in command.kernel_command_line("tcg", 2_596_000).split()
    assert "tsc" not in command.kernel_command_line("kvm", 2_596_000)
    assert option(machine("kvm"), "-accel") == ["kvm"]
    assert option(machine("tcg"), "-accel")[0].startswith("tcg")


@pytest.mark.parametrize(("memory", "most"), [(64 * MIB, 32), (256 * MIB, 32), (GIB, 128), (16 * GIB, 256)])
def test_translated_code_is_limited_by_the_size_of_the_guest(memory: int, most: int) -> None:
    """Without a limit QEMU fills up to 1 GiB for each guest, which no report of its RAM shows."""
    sized = msgspec.structs.replace(MACHINE, memory_bytes=memory)
    assert f"tb-size={most}" in option(machine(spec=sized), "-accel")[0].split(",")


def test_volumes_are_disks_with_a_serial_number() -> None:
    """The guest identifies volumes by their serial number. The VMM opens a read-only volume
    read-only, and all paths are relative.
    """
    disks = tuple(
        VolumeDisk(volume_id="v" * 24, volume_name="data", size_bytes=MIB, mount_path=f"/{number}", readonly=readonly)
        for number, readonly in enumerate((False, True))
    )
    plain = machine()
    arguments = machine(
        spec=MachineSpec(cpus=2, memory_bytes=256 * MIB, overlay_bytes=64 * MIB, kernel="k", volumes=disks)
    )
    # the arguments of a machine without volumes do not change
    assert arguments[: len(plain)] == plain
    for number, mode in enumerate(("off", "on")):
        (node,) = [
            each for each in option(arguments, "-blockdev") if f"node-name=volume{number}.raw" in each.split(",")
        ]
        assert f"read-only={mode}" in node.split(",")
        assert f"file.filename=volume{number}.raw" in node.split(",")
        assert f"virtio-blk-device,drive=volume{number}.raw,serial=volume{number}" in option(arguments, "-device")
