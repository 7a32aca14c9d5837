"""The end of an instance: VMM, directory, lock file, record, in an order that can be repeated from any point."""

from __future__ import annotations

from coppice.completion import in_thread
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import Instance


async def end_vmm(rooms: Rooms, instance: Instance) -> None:
    """End whatever VMM works in the instance's directory, recorded or not. Idempotent.

    A host that was killed between starting a VMM and recording it leaves one that only its working directory names.
    """
    directory = rooms.directory(instance.id)
    if instance.vmm is not None:
        await rooms.driver.quit(directory, instance.vmm)
    orphans = await in_thread(rooms.driver.find_orphans, rooms.layout.instances)
    for process in orphans.get(directory.resolve(), []):
        await rooms.driver.quit(directory, process)


async def destroy(rooms: Rooms, instance: Instance) -> None:
    """Remove an instance and all that is its own. Idempotent; the caller holds its lock, or is alone in knowing it."""
    await end_vmm(rooms, instance)
    await in_thread(directories.remove, rooms.directory(instance.id))
    await in_thread(rooms.store.forget, instance.id)
    rooms.layout.lock(instance.id).unlink(missing_ok=True)
