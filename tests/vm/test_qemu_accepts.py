"""QEMU accepts all that the boundary accepts: a real QEMU starts with each form of each option."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from coppice import network
from coppice.addresses import MAX_PORTS, check_publish
from coppice.client import AsyncHost
from coppice.errors import NotSupported
from coppice.machine import directory as directories
from coppice.model import GIB, MIB, Instance, MachineSpec, Publish, VolumeDisk
from coppice.model.kernel import Kernel
from coppice.names import MAX_CPUS, MAX_VOLUMES, MIN_MEMORY, check_machine, new_id
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch
from coppice.vmm.qemu.command import QMP_SOCKET
from coppice.vmm.qemu.driver import QemuDriver
from coppice.vmm.qemu.monitor import monitor
from fakes.records import make_instance

SMALL = MachineSpec(memory_bytes=128 * MIB, overlay_bytes=64 * MIB)


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port that is free now."""
    with socket.create_server((address, 0)) as server:
        number: int = server.getsockname()[1]
        return number


class Workshop:
    """Starts machines without a host, in a directory whose name is not a valid option value."""

    def __init__(self, host: AsyncHost, kernel: Kernel, root: Path, instances: Path) -> None:
        self._host = host
        self._kernel, self._root, self._instances = kernel, root, instances
        self._driver = host.local.rooms.drivers.chosen
        self.has_acpi = kernel.acpi

    async def accepts(self, machine: MachineSpec, *ports: Publish) -> tuple[Publish, ...]:
        """Start a machine, so that QEMU checks its options; return its ports as picked."""
        check_machine(machine.cpus, machine.memory_bytes, machine.overlay_bytes)
        networks = network.standard(Path("unused"))
        networks.check(machine, check_publish(ports))
        machine = msgspec.structs.replace(machine, kernel=self._kernel.key, acpi=self._kernel.acpi)
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.execute("CREATE TABLE instances (record BLOB)")
            (instance,) = networks.allocate(connection, [make_instance(machine=machine, publish=ports)])
        return await self._start(instance)

    async def _start(self, instance: Instance) -> tuple[Publish, ...]:
        directory = self._instances / instance.id
        directories.create(directory)
        directories.place_root(directory, self._root)
        directories.place_overlay(directory, self._host.local.rooms.overlays, SMALL.overlay_bytes)
        initrd = self._host.local.rooms.initrd(self._kernel, self._driver.capabilities.agent_device)
        directories.place_kernel(directory, self._kernel.boot_image, initrd)
        for number in range(len(instance.machine.volumes)):
            shutil.copy(directory / files.OVERLAY_DISK, directory / files.VOLUME_DISK.format(number))
        able = self._driver.capabilities.nic_backends
        networks = network.standard(Path("unused"))
        nics = await networks.attach(instance, able)
        manifest = await self._driver.manifest(instance.machine)
        launch = Launch(
            directory=directory,
            machine=instance.machine,
            disks=directories.devices(instance.machine),
            nics=nics,
            manifest=manifest,
        )
        process = await self._driver.boot(launch)
        try:
            await self._driver.is_paused(directory)
            if not instance.publish:
                return ()
            async with monitor(directory, QMP_SOCKET) as qmp:
                said = str(await qmp.execute("human-monitor-command", {"command-line": "info usernet"}))
            published = await networks.of(instance.machine).published(instance)
            listening = re.findall(r"(TCP|UDP)\[HOST_FORWARD\] +\d+ +(\S+) +(\d+) ", said)
            assert sorted(listening) == sorted(
                (
                    port.protocol.upper(),
                    "*" if port.host_address == "0.0.0.0" else port.host_address,
                    str(port.host_port),
                )
                for port in published
            )
            return published
        finally:
            await self._driver.quit(directory, process)


@pytest.fixture
async def workshop(host: AsyncHost, image: str) -> AsyncIterator[Workshop]:
    """A workshop in the data directory of a real host."""
    kernel = await host.kernels.fetch()
    root = host.local.rooms.images.root_file(await host.images.inspect(image))
    instances = host.home / f"with,comma=and space %s {new_id()}"
    instances.mkdir()
    yield Workshop(host, kernel, root, instances)
    assert QemuDriver().find_orphans(instances) == {}
    shutil.rmtree(instances)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "0.0.0.0", "own"])
@pytest.mark.parametrize("picked", [False, True])
async def test_every_form_of_a_published_port(workshop: Workshop, protocol: str, address: str, picked: bool) -> None:
    """Both protocols, on every kind of address, with fixed and picked ports."""
    port = Publish(
        host_port=0 if picked else free_port(),
        guest_port=65535,
        protocol="udp" if protocol == "udp" else "tcp",
        host_address=address,
    )
    (published,) = await workshop.accepts(SMALL, port)
    assert published.host_port == port.host_port or picked
    assert published.host_port > 0


async def test_the_largest_number_of_published_ports(workshop: Workshop) -> None:
    """Fixed and picked host ports all lead to one guest port."""
    fixed = free_port()
    ports = [
        Publish(host_port=0 if number % 2 else fixed, guest_port=80, host_address=f"127.9.0.{number + 1}")
        for number in range(MAX_PORTS)
    ]
    published = await workshop.accepts(SMALL, *ports)
    assert [port.host_address for port in published] == [port.host_address for port in ports]
    assert all(port.host_port for port in published)


@pytest.mark.parametrize(
    "machine",
    [
        MachineSpec(memory_bytes=MIN_MEMORY, overlay_bytes=64 * MIB),
        MachineSpec(memory_bytes=MIN_MEMORY + MIB, overlay_bytes=64 * MIB),
        MachineSpec(memory_bytes=3 * GIB + MIB, overlay_bytes=64 * MIB),
        MachineSpec(memory_bytes=5 * GIB, overlay_bytes=64 * MIB, cpus=3),
        MachineSpec(memory_bytes=256 * MIB, overlay_bytes=64 * MIB, cpus=MAX_CPUS),
        MachineSpec(memory_bytes=128 * MIB, overlay_bytes=64 * MIB, network="none"),
        MachineSpec(
            memory_bytes=128 * MIB,
            overlay_bytes=64 * MIB,
            volumes=tuple(
                VolumeDisk(
                    volume_id=new_id(),
                    volume_name=f"v{number}",
                    size_bytes=64 * MIB,
                    mount_path=f"/srv/with,comma {number}",
                    readonly=number % 2 == 1,
                )
                for number in range(MAX_VOLUMES)
            ),
        ),
    ],
    ids=["least-memory", "odd-memory", "above-3-GiB", "above-4-GiB", "most-CPUs", "no-NIC", "most-volumes"],
)
async def test_every_size_of_a_machine(workshop: Workshop, machine: MachineSpec) -> None:
    """The bounds that the boundary accepts, and sizes between them."""
    if not workshop.has_acpi and len(machine.volumes) == MAX_VOLUMES:
        with pytest.raises(NotSupported, match="no ACPI"):
            await workshop.accepts(machine)
        return
    assert await workshop.accepts(machine) == ()
