"""Finish or undo one interrupted operation; record an instance whose VMM has ended.

The caller holds the exclusive lock of the instance. Few commands meet such an instance, so
`coppice.host.recovery` imports this module only then.
"""

from __future__ import annotations

import asyncio

import msgspec

from coppice.completion import in_thread
from coppice.errors import IntegrityError, VmmTimeout
from coppice.linux.files import untranslated
from coppice.machine import capture, destroy, disks, last_words, limits, rest_disk
from coppice.machine import directory as directories
from coppice.machine.rooms import Rooms
from coppice.model import Instance, State
from coppice.model.supervision import Ending
from coppice.snapshots import rollback, snapshot
from coppice.state.journal import OF_SNAPSHOTS, OF_VOLUMES, JournalEntry, JournalOperation
from coppice.timing import Stages
from coppice.vmm import driver as files
from coppice.volumes import directory as volume

_ENDING_S = 10.0  # an ending process is gone in milliseconds, unless the kernel waits for a disk
_HAS_RUN = frozenset({State.RUNNING, State.PAUSED, State.SHUTDOWN})


async def resolve(rooms: Rooms, entry: JournalEntry) -> str:
    """Finish or undo an interrupted operation; return a line that says what was done."""
    if entry.operation in OF_SNAPSHOTS | OF_VOLUMES:
        await (snapshot if entry.operation in OF_SNAPSHOTS else volume).remove(rooms, entry.instance)
        return f"{entry.operation} of {entry.instance} was interrupted: removed"
    instance, _ = await rooms.store.look_up(entry.instance)
    what = f"{entry.operation} of {instance.name} was interrupted"
    with untranslated(f"resolve that {what}"):
        return await _resolved(rooms, entry, instance, what)


async def _resolved(rooms: Rooms, entry: JournalEntry, instance: Instance, what: str) -> str:
    match entry.operation:
        case JournalOperation.RUN | JournalOperation.FORK | JournalOperation.REMOVE:
            await destroy.destroy(rooms, instance)
            return f"{what}: removed"
        case JournalOperation.STANDBY_COMMIT:
            try:
                await capture.finish(rooms, instance, Stages())
            except IntegrityError as error:  # another program has removed its files
                settled = await settle(rooms, instance, error.message)
                return f"{what}: {settled.state}"
            return f"{what}: finished"
        case JournalOperation.SNAPSHOT_RESTORE_COMMIT:
            await rollback.finish(rooms, instance)
            return f"{what}: finished"
        case JournalOperation.SNAPSHOT_RESTORE:
            await rollback.undo(rooms, instance)
            return f"{what}: undone"
        case JournalOperation.MERGE:
            await rest_disk.finish(rooms, instance)
            return f"{what}: {instance.state}"
        case JournalOperation.STANDBY | JournalOperation.FORK_RUNNING if instance.vmm is not None and rooms.driver(
            instance
        ).alive(instance.vmm):
            # No record says whether the guest is frozen, so thaw it: a needless thaw does no harm.
            await capture.undo(rooms, instance, frozen=entry.operation is JournalOperation.FORK_RUNNING)
            return f"{what}: the guest continues"
        case _:
            ending: Ending | None = "failed" if instance.state in _HAS_RUN else None
            if entry.operation is JournalOperation.STOP:
                ending = "asked"
            settled = await settle(rooms, instance, f"{entry.operation} was interrupted", ending)
            return f"{what}: {settled.state}"


async def settle(rooms: Rooms, instance: Instance, reason: str, ending: Ending | None = None) -> Instance:
    """Record an instance without a working VMM as Standby or Stopped. Idempotent. Without an
    `ending` it keeps the one that it has.

    It is Standby if it has not run since its capture, and memory and disk are still from one
    instant. Otherwise it is Stopped: a running guest's memory is lost, and silently returning to
    the capture would hide that.
    """
    directory = rooms.directory(instance.id)
    await destroy.end_vmm(rooms, instance)
    await in_thread(directories.clear_runtime, directory)
    recorded, _ = await rooms.store.look_up(instance.id)
    if recorded.disk_layers != instance.disk_layers:  # a cancelled call does not return what it has recorded
        instance = msgspec.structs.replace(instance, disk_layers=recorded.disk_layers, capture=recorded.capture)
    await in_thread(disks.remove_others, directory, instance)
    whole = instance.state not in _HAS_RUN and await in_thread(directories.capture_is_current, directory, instance)
    if not whole:
        await in_thread(directories.clear_capture, directory)
    settled = msgspec.structs.replace(
        instance,
        state=State.STANDBY if whole else State.STOPPED,
        vmm=None,
        exit_reason=reason,
        ending=ending or instance.ending,
        capture=instance.capture if whole else None,
    )
    await in_thread(rooms.store.save, settled, done=True)
    return settled


async def settle_ended(rooms: Rooms, instance: Instance) -> Instance:
    """Settle an instance whose VMM has ended by itself. The reason is its guest's or VMM's own."""
    return await settle(rooms, instance, *await _last_words(rooms, instance))


async def _last_words(rooms: Rooms, instance: Instance) -> tuple[str, Ending]:
    """Return why a VMM has ended, and whether that was a failure."""
    if instance.vmm is None:
        return "the VMM is gone", "failed"
    directory = rooms.directory(instance.id)
    try:
        async with asyncio.timeout(_ENDING_S):
            ended = await rooms.driver(instance).wait_exit(directory, instance.vmm)
    except TimeoutError as error:
        raise VmmTimeout(
            f"the VMM of {instance.name} did not end within {_ENDING_S:g} s",
            hint=f"run `ps -o pid,state,wchan {instance.vmm.pid}`: state D is a process stuck in the kernel",
        ) from error
    if exceeded := await in_thread(limits.exceeded, instance, directory):
        return exceeded, "failed"
    said = await in_thread(last_words.of_end, directory / files.CONSOLE_LOG, instance.started_at or 0.0)
    if said is None:
        return f"the VMM ended: {ended}", "failed"
    return said, "clean" if said in last_words.OWN_WILL else "failed"
