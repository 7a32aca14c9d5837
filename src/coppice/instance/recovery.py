"""What an interrupted operation left: finished or undone, by whoever looks next.

The journal names operations whose process is dead; the files say how far they came. Beside that, a VMM that ended by itself, was killed from outside, or
went with a reboot, is seen when its instance is looked at, and the record is made true.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from coppice.errors import NotFound
from coppice.instance import capture, destroy
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import Instance, State
from coppice.store import locks
from coppice.store.store import JournalEntry
from coppice.timing import Stages
from coppice.vmm.process import start_ticks

_log = logging.getLogger(__name__)

_WITH_VMM = frozenset({State.INITIALIZING, State.RUNNING, State.PAUSED, State.SHUTDOWN})


async def recover(rooms: Rooms) -> list[str]:
    """Resolve every interrupted operation; return what was done, a line each. What another process resolves meanwhile is left to it."""
    done: list[str] = []
    for entry in await asyncio.to_thread(rooms.store.journal):
        if start_ticks(entry.owner_pid) == entry.owner_ticks:
            continue  # under way
        descriptor = locks.try_lock(rooms.layout.lock(entry.instance))
        if descriptor is None:
            continue
        try:
            done.append(await _resolve(rooms, entry))
        except NotFound:
            await asyncio.to_thread(rooms.store.forget, entry.instance)
        finally:
            locks.release(descriptor)
    for line in done:
        _log.warning("recovered: %s", line)
    return done


async def _resolve(rooms: Rooms, entry: JournalEntry) -> str:
    instance = await asyncio.to_thread(rooms.store.get, entry.instance)
    what = f"{entry.operation} of {instance.name} was interrupted"
    match entry.operation:
        case "run" | "fork" | "rm":
            await destroy.destroy(rooms, instance)
            return f"{what}: removed"
        case capture.COMMITTED:
            await capture.finish(rooms, instance, Stages())
            return f"{what}: finished"
        case "standby" if instance.vmm is not None and rooms.driver.alive(instance.vmm):
            await capture.undo(rooms, instance)
            return f"{what}: the guest runs on"
        case _:
            settled = await settle(rooms, instance, f"{entry.operation} was interrupted")
            return f"{what}: {settled.state}"


async def settle(rooms: Rooms, instance: Instance, reason: str) -> Instance:
    """Bring an instance without a working VMM to rest: Standby if its capture still matches its disk, else Stopped. Idempotent."""
    directory = rooms.directory(instance.id)
    await destroy.end_vmm(rooms, instance)
    await asyncio.to_thread(directories.clear_runtime, directory)
    whole = instance.mem_file is not None and await asyncio.to_thread(
        directories.capture_is_current, directory, instance.disk_stamp
    )
    if not whole:
        await asyncio.to_thread(directories.clear_capture, directory)
    settled = msgspec.structs.replace(
        instance,
        state=State.STANDBY if whole else State.STOPPED,
        vmm=None,
        exit_reason=reason,
        mem_file=instance.mem_file if whole else None,
        captured_at=instance.captured_at if whole else None,
    )
    await asyncio.to_thread(rooms.store.save, settled, done=True)
    return settled


async def look(rooms: Rooms, instance: Instance, *, locked: bool = False) -> Instance:
    """Return the instance as it truly is: one whose VMM is gone is recorded as such, unless an operation is at work on it."""
    if instance.state not in _WITH_VMM or instance.vmm is None or rooms.driver.alive(instance.vmm):
        return instance
    if locked:
        return await settle(rooms, instance, await _last_words(rooms, instance))
    descriptor = locks.try_lock(rooms.layout.lock(instance.id))
    if descriptor is None:
        return instance
    try:
        current = await asyncio.to_thread(rooms.store.get, instance.id)
        return await look(rooms, current, locked=True)
    finally:
        locks.release(descriptor)


async def _last_words(rooms: Rooms, instance: Instance) -> str:
    if instance.vmm is None:
        return "the VMM is gone"
    return f"the VMM ended: {await rooms.driver.wait_exit(rooms.directory(instance.id), instance.vmm)}"
