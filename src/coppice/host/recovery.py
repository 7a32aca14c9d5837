"""Finish or undo interrupted operations, and record VMMs that ended.

The journal names operations whose process is dead; the files show how far they came. A VMM that
ended by itself, was killed, or was lost in a reboot is detected when its instance is next looked
at; its record is then corrected.

Most commands find nothing to settle, so `coppice.host.settling` is imported only when they do.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from coppice.completion import in_thread
from coppice.errors import Busy, CoppiceError, NotFound
from coppice.machine.rooms import Rooms
from coppice.model import Instance, State
from coppice.names import is_id
from coppice.state import locks
from coppice.state.journal import OF_SNAPSHOTS, OF_VOLUMES, JournalEntry
from coppice.vmm.process import start_ticks

_log = logging.getLogger(__name__)

_RELEASE_S = 5.0  # until all locks of a killed process are free
_RETRY_S = 0.005  # a free flock has no event that can be awaited with a deadline
_WITH_VMM = frozenset({State.INITIALIZING, State.RUNNING, State.PAUSED, State.SHUTDOWN})


def is_needed(rooms: Rooms) -> bool:
    """Return whether `recover` or `sweep` would find something to do. Blocks."""
    return (
        any(is_interrupted(entry) for entry in rooms.store.journal())
        or _has_half_made(rooms.layout.images)
        or bool(_without_record(rooms))
    )


async def recover(rooms: Rooms, *, only: str | None = None) -> list[str]:
    """Resolve every interrupted operation, or that of the instance `only`; return a line for each.

    Operations that another process holds for long are left to it. One that cannot be resolved is
    logged and does not stop the others.
    """
    done: list[str] = []
    loop = asyncio.get_running_loop()
    end = loop.time() + _RELEASE_S
    for entry in await in_thread(rooms.store.journal):
        if only not in (None, entry.instance) or not is_interrupted(entry):
            continue
        try:
            # Wait: a killed process keeps its locks until its last system call ends and its last
            # child execs.
            lock = rooms.layout.lock(entry.instance)
            async with locks.hold(lock, deadline_s=end - loop.time(), what=entry.instance):
                done += await _resolve_held(rooms, entry)
        except Busy:
            _log.info("%s of %s was interrupted, and another process holds it", entry.operation, entry.instance)
        except OSError as error:  # the lock file is another user's, or cannot be made on a full disk
            _log.warning(
                "%s of %s was interrupted and cannot be resolved yet: %s", entry.operation, entry.instance, error
            )
    for line in done:
        _log.warning("recovered: %s", line)
    return done


async def sweep(rooms: Rooms) -> None:
    """Remove half-made images, and ids that have a lock file or an attached network but no record,
    unless their lock is held.

    A removal that was killed may leave its lock file, and a host process that was killed may leave
    spares, which have no record. An id that cannot be removed is logged and does not stop the
    others.
    """
    if await in_thread(_has_half_made, rooms.layout.images):
        await in_thread(rooms.images.content.sweep)
    end = asyncio.get_running_loop().time() + _RELEASE_S
    for key in await in_thread(_without_record, rooms):
        try:
            descriptor = await _take_of_the_gone(rooms.layout.lock(key), end)
        except OSError as error:
            _log.warning("%s has no record, and its lock cannot be opened: %s", key, error)
            continue
        if descriptor is not None:
            from coppice.machine import destroy

            try:
                # Check again under the lock: a spare may have become a fork, or a snapshot may be
                # complete.
                if key not in await in_thread(rooms.store.known) and await destroy.remove_unrecorded(rooms, key):
                    _log.warning("recovered: %s had no record and no holder: removed", key)
            except (CoppiceError, OSError) as error:
                _log.warning("%s has no record and cannot be removed yet: %s", key, error)
            finally:
                locks.release(descriptor)


async def _take_of_the_gone(lock: Path, end: float) -> int | None:
    """Take a lock and return its descriptor; None if a living process holds it.

    A killed process's lock becomes free when its last child closes it, which the child does before
    it runs its program. Wait for that until `end`, in seconds of the loop's clock.
    """
    while (descriptor := locks.try_lock(lock)) is None:
        remaining = end - asyncio.get_running_loop().time()
        if remaining <= 0 or not await in_thread(locks.holder_is_gone, lock):
            return locks.try_lock(lock)  # the holder may have ended between the two checks
        await asyncio.sleep(min(_RETRY_S, remaining))
    return descriptor


def _has_half_made(directory: Path) -> bool:
    """Return whether the directory of a content store has half-made content, without its module."""
    return any(each.name.startswith(".") and each.name != ".lock" for each in directory.iterdir())


def _without_record(rooms: Rooms) -> set[str]:
    # Read records last: a lock file is made after its record. Only a spare's lock is held without a
    # record.
    present = {path.stem for path in rooms.layout.locks.iterdir()}
    unowned = {key for key in present if is_id(key)} - rooms.store.known()
    return unowned | rooms.networks.leftovers(rooms.store.known)


async def _resolve_held(rooms: Rooms, entry: JournalEntry) -> list[str]:
    """Resolve an operation if it is still interrupted. The caller holds its lock."""
    try:
        # Check again under the lock: another process may have resolved it and begun a new
        # operation.
        if entry.operation in OF_SNAPSHOTS:
            if entry.instance not in await in_thread(rooms.store.snapshots.ids):
                raise NotFound(f"the snapshot {entry.instance} is gone")
        elif entry.operation in OF_VOLUMES:
            if entry.instance not in await in_thread(rooms.store.volumes.ids):
                raise NotFound(f"the volume {entry.instance} is gone")
        else:
            await rooms.store.look_up(entry.instance)
        current = await in_thread(rooms.store.journal_entry, entry.instance)
        if current is None or not is_interrupted(current):
            return []
        from coppice.host import settling

        return [await settling.resolve(rooms, current)]
    except NotFound:
        await in_thread(rooms.store.forget, entry.instance)
        locks.remove(rooms.layout.lock(entry.instance))
    except CoppiceError as error:
        _log.warning("%s of %s was interrupted and cannot be resolved yet: %s", entry.operation, entry.instance, error)
    return []


def is_interrupted(entry: JournalEntry) -> bool:
    """Return whether the process of an operation died, and nothing was resolved yet."""
    try:
        return start_ticks(entry.owner_pid) != entry.owner_ticks
    except PermissionError:  # the kernel hides another user's process (hidepid=1): it may be the owner
        return False


async def look(rooms: Rooms, instance: Instance) -> Instance:
    """Return the instance in its true state: if its VMM has ended, record that first.

    An instance that another operation holds is returned as recorded.

    :raises NotFound: the instance was removed meanwhile
    """
    if not _is_gone(rooms, instance):
        return instance
    lock = rooms.layout.lock(instance.id)
    descriptor = locks.try_lock(lock)
    if descriptor is None:
        return instance
    try:
        with locks.of_record(lock, instance.name):
            return await look_locked(rooms, *await rooms.store.look_up(instance.id))
    finally:
        locks.release(descriptor)


async def look_locked(rooms: Rooms, instance: Instance, entry: JournalEntry | None) -> Instance:
    """Do as `look` does for an instance whose exclusive lock the caller holds. An interrupted
    operation is resolved too.

    :param entry: the journal's operation on the instance, if there is one
    """
    gone = _is_gone(rooms, instance)
    if entry is not None and (gone or is_interrupted(entry)):  # a committed capture must not be lost
        from coppice.host import settling

        _log.warning("recovered: %s", await settling.resolve(rooms, entry))
        return (await rooms.store.look_up(instance.id))[0]
    if not gone:
        return instance
    from coppice.host import settling

    return await settling.settle_ended(rooms, instance)


def _is_gone(rooms: Rooms, instance: Instance) -> bool:
    """Return whether a VMM is recorded that has ended."""
    return instance.state in _WITH_VMM and instance.vmm is not None and not rooms.driver(instance).alive(instance.vmm)
