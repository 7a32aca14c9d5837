"""The end of an instance: VMM, directory, lock file, record, in an order that can be repeated from any point."""

from __future__ import annotations

from pathlib import Path

from coppice.completion import in_thread
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import Instance, VmmProcess


async def end_vmm(rooms: Rooms, instance: Instance) -> None:
    """End whatever VMM works in the instance's directory, recorded or not. Idempotent.

    A host that was killed between starting a VMM and recording it leaves one that only its working directory names.
    """
    directory = rooms.directory(instance.id)
    if instance.vmm is not None:
        await rooms.driver.quit(directory, instance.vmm)
    await end_all_in(rooms, directory)


async def end_all_in(rooms: Rooms, directory: Path) -> None:
    """End every VMM that works in an instance's directory. Idempotent."""
    while processes := await in_thread(working_in, rooms, directory):
        for process in processes:
            await rooms.driver.quit(directory, process)
        # Again: a launcher that became the VMM in between is another program by now, and was left alone.


def working_in(rooms: Rooms, directory: Path) -> list[VmmProcess]:
    """The VMM processes that work in an instance's directory, recorded or not. Blocks."""
    return rooms.driver.find_orphans(rooms.layout.instances).get(directory.resolve(), [])


async def destroy(rooms: Rooms, instance: Instance) -> None:
    """Remove an instance and all that is its own. Idempotent; the caller holds its lock, or is alone in knowing it."""
    await end_vmm(rooms, instance)
    await in_thread(directories.remove, rooms.directory(instance.id))
    await in_thread(rooms.store.forget, instance.id)
    rooms.layout.lock(instance.id).unlink(missing_ok=True)


async def remove_unrecorded(rooms: Rooms, instance_id: str) -> bool:
    """Remove what is there under an id that no record has; tell whether that was more than a lock file. Idempotent; the caller holds its lock."""
    directory = rooms.directory(instance_id)
    if present := directory.exists():
        await end_all_in(rooms, directory)
    await in_thread(directories.remove, directory)  # or what a removal that was killed has left of it
    rooms.layout.lock(instance_id).unlink(missing_ok=True)
    return present
