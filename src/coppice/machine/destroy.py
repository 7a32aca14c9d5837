"""Remove an instance: VMM, directory, record, lock file. Each step can be repeated."""

from __future__ import annotations

from pathlib import Path

from coppice.completion import in_thread
from coppice.machine import directory as directories
from coppice.machine import limits, volumes
from coppice.machine.rooms import Rooms
from coppice.model import Instance, VmmProcess
from coppice.state import locks
from coppice.vmm.driver import VmmDriver


async def end_vmm(rooms: Rooms, instance: Instance) -> None:
    """End every VMM in the instance's directory, recorded or not, and detach its network.
    Idempotent.

    A host process that was killed between starting a VMM and recording it leaves a VMM that only
    its working directory identifies.
    """
    directory = rooms.directory(instance.id)
    if instance.vmm is not None:
        await rooms.driver(instance).quit(directory, instance.vmm)
    await end_all_in(rooms, instance.id)


async def end_all_in(rooms: Rooms, instance_id: str) -> None:
    """End every driver's VMMs in an instance's directory, and detach its network. Idempotent."""
    directory = rooms.directory(instance_id)
    while found := await in_thread(working_in, rooms, directory):
        for process, driver in found.items():
            await driver.quit(directory, process)
        # Repeat: a launcher that became the VMM meanwhile has another executable, so `quit` left it
        # alone.
    await in_thread(limits.release, directory)
    await rooms.networks.detach(instance_id)


def working_in(rooms: Rooms, directory: Path) -> dict[VmmProcess, VmmDriver]:
    """Return the VMM processes in an instance's directory, with their drivers. Blocks."""
    return {
        process: driver
        for driver in rooms.drivers
        for process in driver.find_orphans(rooms.layout.instances).get(directory.resolve(), [])
    }


async def destroy(rooms: Rooms, instance: Instance, *, settled: bool = False) -> None:
    """Remove an instance with its VMM and files. Idempotent.

    The caller holds its lock, or no other process knows the instance.

    :param settled: no earlier operation on it was interrupted or failed: it has no VMM but the
        recorded one, and no other process has to be looked for
    """
    directory = rooms.directory(instance.id)
    await rooms.ports(instance).close_idle()  # a file that goes at its last close costs the loop milliseconds
    if settled:
        if instance.vmm is not None:
            await rooms.driver(instance).quit(directory, instance.vmm)
        await rooms.networks.detach(instance.id)
    else:
        await end_vmm(rooms, instance)
    await in_thread(_forget, rooms, instance)


def _forget(rooms: Rooms, instance: Instance) -> None:
    directory = rooms.directory(instance.id)
    limits.release(directory)
    volumes.give_back(rooms, instance)
    directories.remove(directory)
    rooms.store.forget(instance.id)
    locks.remove(rooms.layout.lock(instance.id))


async def remove_unrecorded(rooms: Rooms, instance_id: str) -> bool:
    """Remove the VMM, files and lock of an id without a record. Idempotent; the caller holds its
    lock.

    :return: whether the id had a directory
    """
    directory = rooms.directory(instance_id)
    present = directory.exists()
    await end_all_in(rooms, instance_id)
    await in_thread(directories.remove, directory)  # also finishes a removal that was killed
    await in_thread(rooms.store.release_user, instance_id)
    locks.remove(rooms.layout.lock(instance_id))
    return present
