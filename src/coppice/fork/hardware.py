"""The machine of a fork and the VMM that runs it."""

from __future__ import annotations

import msgspec

from coppice.completion import in_thread
from coppice.errors import NotSupported
from coppice.fork.plan import takes_memory
from coppice.machine.rooms import Rooms
from coppice.machine.volumes import with_clones
from coppice.model import Instance, MachineSpec
from coppice.requests import FanOut


async def hardware(rooms: Rooms, source: Instance, request: FanOut) -> tuple[str, MachineSpec]:
    """Return the driver's name and the machine of a source's forks: the source's own with clones of
    the volumes that it writes to, unless another VMM is requested.

    Another VMM gives the same disks to a machine of its own kind. That machine keeps its network if
    the VMM can attach it.

    :raises UsageError: there is no such VMM
    :raises HostCannot: this host has no network that the other VMM can attach
    :raises NotSupported: the forks take the source's memory, which only the source's VMM can load
    """
    machine = with_clones(source.machine)
    if request.vmm is None or request.vmm == source.driver:
        return source.driver, machine
    driver = rooms.drivers.wanted(request.vmm)
    if takes_memory(source, request.target):
        raise NotSupported(
            f"{driver.name} cannot load the memory of {source.name}, which {source.driver} has captured",
            hint=f"take its disk alone, with `--target stopped --vmm {driver.name}`, and `coppice start` the forks",
        )
    network = await in_thread(rooms.networks.kept, source.machine.network, driver.capabilities.nic_backends)
    return driver.name, msgspec.structs.replace(machine, network=network)
