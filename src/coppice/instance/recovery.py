"""What an interrupted operation left: finished or undone, by whoever looks next.

The journal names operations whose process is dead; the files say how far they came. Beside that, a VMM that ended by itself, was killed from outside, or
went with a reboot, is seen when its instance is looked at, and the record is made true.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from coppice.completion import in_thread
from coppice.disk.atomic import os_errors
from coppice.errors import Busy, CoppiceError, IntegrityError, NotFound, VmmTimeout
from coppice.instance import capture, destroy, last_words, live, rollback, snapshot, volume
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import Instance, State
from coppice.names import is_id
from coppice.store import locks
from coppice.store.store import JournalEntry
from coppice.timing import Stages
from coppice.vmm import driver as files
from coppice.vmm.process import start_ticks

_log = logging.getLogger(__name__)

_ENDING_S = 10.0  # a process that has no program any more is gone in milliseconds, unless the kernel waits for a disk
_RELEASE_S = 5.0  # until the locks of a process that was killed are free, all together
_HAS_RUN = frozenset({State.RUNNING, State.PAUSED, State.SHUTDOWN})
_OF_SNAPSHOTS = frozenset({snapshot.OPERATION, snapshot.REMOVAL})
_OF_VOLUMES = frozenset({volume.CREATION, volume.REMOVAL})
_WITH_VMM = frozenset({State.INITIALIZING, State.RUNNING, State.PAUSED, State.SHUTDOWN})


async def recover(rooms: Rooms, *, only: str | None = None) -> list[str]:
    """Resolve every interrupted operation, or that of the instance `only`; return what was done, a line each.

    What another process holds for long is left to it, and what cannot be resolved keeps nobody from the rest.
    """
    done: list[str] = []
    loop = asyncio.get_running_loop()
    end = loop.time() + _RELEASE_S
    for entry in await in_thread(rooms.store.journal):
        if only not in (None, entry.instance) or not _interrupted(entry):
            continue
        try:
            # Waits: a killed process lets go of its locks only when its last system call has ended, and the last child that it forked runs a program.
            lock = rooms.layout.lock(entry.instance)
            async with locks.hold(lock, deadline_s=end - loop.time(), what=entry.instance):
                done += await _resolve_held(rooms, entry)
        except Busy:
            _log.info("%s of %s was interrupted, and is in other hands", entry.operation, entry.instance)
        except OSError as error:  # its lock: another user's, or there is no room for a file
            _log.warning(
                "%s of %s was interrupted and cannot be resolved yet: %s", entry.operation, entry.instance, error
            )
    for line in done:
        _log.warning("recovered: %s", line)
    return done


async def sweep(rooms: Rooms) -> None:
    """Remove what has a lock file and no record, unless somebody holds it.

    A removal ends with the lock file, and may have been killed just before; and a spare of a host that was killed has no record. What cannot be removed
    keeps nobody from the rest.
    """
    for key in await in_thread(_without_record, rooms):
        try:
            descriptor = locks.try_lock(rooms.layout.lock(key))
        except OSError as error:
            _log.warning("%s has no record and cannot be looked at: %s", key, error)
            continue
        if descriptor is not None:
            try:
                # Again, now that it is held: a spare has become a fork meanwhile, or a snapshot is whole.
                if key not in await in_thread(rooms.store.known) and await destroy.remove_unrecorded(rooms, key):
                    _log.warning("recovered: %s had no record and nobody held it: removed", key)
            except (CoppiceError, OSError) as error:
                _log.warning("%s has no record and cannot be removed yet: %s", key, error)
            finally:
                locks.release(descriptor)


def _without_record(rooms: Rooms) -> set[str]:
    # Records are read last: a lock file is made after its record, and but for a spare's it is not held without one.
    present = {path.stem for path in rooms.layout.locks.iterdir()}
    return {key for key in present if is_id(key)} - rooms.store.known()


async def _resolve_held(rooms: Rooms, entry: JournalEntry) -> list[str]:
    """Resolve an operation, if it still is an interrupted one; the caller holds its lock. Return what was done."""
    try:
        # Again, now that it is locked: another process may have resolved it, and begun something new.
        if entry.operation in _OF_SNAPSHOTS:
            if entry.instance not in await in_thread(rooms.store.snapshots.ids):
                raise NotFound(f"the snapshot {entry.instance} is gone")
        elif entry.operation in _OF_VOLUMES:
            if entry.instance not in await in_thread(rooms.store.volumes.ids):
                raise NotFound(f"the volume {entry.instance} is gone")
        else:
            await in_thread(rooms.store.get, entry.instance)
        current = await in_thread(rooms.store.journal_entry, entry.instance)
        return [await _resolve(rooms, current)] if current is not None and _interrupted(current) else []
    except NotFound:
        await in_thread(rooms.store.forget, entry.instance)
        rooms.layout.lock(entry.instance).unlink(missing_ok=True)
    except CoppiceError as error:
        _log.warning("%s of %s was interrupted and cannot be resolved yet: %s", entry.operation, entry.instance, error)
    return []


async def is_interrupted(rooms: Rooms, instance: Instance) -> bool:
    """Whether a process died in the midst of changing this instance, and nobody has resolved it yet."""
    entry = await in_thread(rooms.store.journal_entry, instance.id)
    return entry is not None and _interrupted(entry)


def _interrupted(entry: JournalEntry) -> bool:
    try:
        return start_ticks(entry.owner_pid) != entry.owner_ticks
    except PermissionError:  # another user's process, of which the kernel says nothing (hidepid=1): it may be that one
        return False


async def _resolve(rooms: Rooms, entry: JournalEntry) -> str:
    if entry.operation in _OF_SNAPSHOTS | _OF_VOLUMES:
        await (snapshot if entry.operation in _OF_SNAPSHOTS else volume).remove(rooms, entry.instance)
        return f"{entry.operation} of {entry.instance} was interrupted: removed"
    instance = await in_thread(rooms.store.get, entry.instance)
    what = f"{entry.operation} of {instance.name} was interrupted"
    with os_errors(f"resolve that {what}"):
        return await _resolved(rooms, entry, instance, what)


async def _resolved(rooms: Rooms, entry: JournalEntry, instance: Instance, what: str) -> str:
    match entry.operation:
        case "run" | "fork" | "rm":
            await destroy.destroy(rooms, instance)
            return f"{what}: removed"
        case capture.COMMITTED:
            try:
                with os_errors(f"finish the capture of {instance.name}"):
                    await capture.finish(rooms, instance, Stages())
            except IntegrityError as error:  # its files are gone: somebody else has removed them
                settled = await settle(rooms, instance, error.message)
                return f"{what}: {settled.state}"
            return f"{what}: finished"
        case rollback.COMMITTED:
            await rollback.finish(rooms, instance)
            return f"{what}: finished"
        case rollback.OPERATION:
            await rollback.undo(rooms, instance)
            return f"{what}: it is as it was"
        case capture.OPERATION | live.OPERATION if instance.vmm is not None and rooms.driver.alive(instance.vmm):
            # How far it came is not recorded: a guest that was frozen is thawed, and a second thaw does no harm.
            may_be_frozen = entry.operation == live.OPERATION
            await capture.undo(rooms, msgspec.structs.replace(instance, frozen=may_be_frozen))
            return f"{what}: the guest runs on"
        case _:
            settled = await settle(rooms, instance, f"{entry.operation} was interrupted")
            return f"{what}: {settled.state}"


async def settle(rooms: Rooms, instance: Instance, reason: str) -> Instance:
    """Bring an instance without a working VMM to rest. Idempotent.

    Standby if it never came to run since its capture, and memory and disk are still of one instant; else Stopped: what a running guest
    had in its memory is lost, and going back to the capture in silence would hide that.
    """
    directory = rooms.directory(instance.id)
    await destroy.end_vmm(rooms, instance)
    with os_errors(f"bring {instance.name} to rest"):
        await in_thread(directories.clear_runtime, directory)
    whole = (
        instance.mem_file is not None
        and instance.state not in _HAS_RUN
        and await in_thread(directories.capture_is_current, directory, instance.disk_stamp)
    )
    if not whole:
        await in_thread(directories.clear_capture, directory)
    settled = msgspec.structs.replace(
        instance,
        state=State.STANDBY if whole else State.STOPPED,
        vmm=None,
        exit_reason=reason,
        mem_file=instance.mem_file if whole else None,
        captured_at=instance.captured_at if whole else None,
    )
    await in_thread(rooms.store.save, settled, done=True)
    return settled


async def look(rooms: Rooms, instance: Instance, *, locked: bool = False) -> Instance:
    """Return the instance as it truly is: one whose VMM is gone is recorded as such, unless an operation is at work on it.

    `locked` says that the caller holds it exclusively; then an operation that was interrupted is resolved too.

    :raises NotFound: it was removed meanwhile
    """
    gone = instance.state in _WITH_VMM and instance.vmm is not None and not rooms.driver.alive(instance.vmm)
    if locked:
        entry = await in_thread(rooms.store.journal_entry, instance.id)
        if entry is not None and (gone or _interrupted(entry)):  # a capture that was committed is not to be lost now
            _log.warning("recovered: %s", await _resolve(rooms, entry))
            return await in_thread(rooms.store.get, instance.id)
        return await settle(rooms, instance, await _last_words(rooms, instance)) if gone else instance
    if not gone:
        return instance
    lock = rooms.layout.lock(instance.id)
    descriptor = locks.try_lock(lock)
    if descriptor is None:
        return instance
    try:
        current = await in_thread(rooms.store.get, instance.id)
        return await look(rooms, current, locked=True)
    except NotFound:
        lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
        raise
    finally:
        locks.release(descriptor)


async def _last_words(rooms: Rooms, instance: Instance) -> str:
    if instance.vmm is None:
        return "the VMM is gone"
    directory = rooms.directory(instance.id)
    try:
        async with asyncio.timeout(_ENDING_S):
            ended = await rooms.driver.wait_exit(directory, instance.vmm)
    except TimeoutError as error:
        raise VmmTimeout(
            f"the VMM of {instance.name} is ending, and not gone after {_ENDING_S:g} s",
            hint="look for it in `ps` (state D)",
        ) from error
    said = await in_thread(last_words.of_end, directory / files.CONSOLE_LOG, instance.started_at or 0.0)
    return said or f"the VMM ended: {ended}"
