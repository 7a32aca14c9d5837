"""The disks of an instance at rest, before others are made of it.

A disk with as many layers as it may have is merged once, in its source, and not by each fork. A capture
of a machine that goes on does that while it runs (see `live_disk`). This module does it for an instance at rest,
when it becomes a source: one that is only stopped, or put into standby, keeps its layers.

The merged layer is a new file. The record names it once it is durable, and only then the old files are
removed. So the recorded disk is whole at any moment. The layer that the record does not name is removed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError
from coppice.machine import directory as directories
from coppice.machine import disk, disks
from coppice.machine.rooms import Rooms
from coppice.model import Instance
from coppice.state.journal import JournalOperation

_log = logging.getLogger(__name__)


async def merge(rooms: Rooms, instance: Instance) -> Instance:
    """Merge the layers of each full disk; return the record, saved if it has changed.

    The caller holds the exclusive lock. If the merge fails, for example on a full file system, the disks stay as
    they are: each fork and the next start merge the layers for themselves.
    """
    try:
        with _logged(instance):
            await in_thread(rooms.store.begin, instance, JournalOperation.MERGE)
            await in_thread(_merge, rooms, instance)
    finally:
        with _logged(instance):  # so that it replaces no cancellation
            instance = await complete(finish(rooms, instance))
    return instance


@contextlib.contextmanager
def _logged(instance: Instance) -> Iterator[None]:
    try:
        yield
    except CoppiceError as error:
        _log.warning("the disk layers of %s are not merged: %s", instance.name, error)


def _merge(rooms: Rooms, instance: Instance) -> None:
    directory, driver = rooms.directory(instance.id), rooms.driver(instance)
    current = directories.capture_is_current(directory, instance)
    merged = [disk.merge_all(directory, each, driver) if each.is_full else each for each in disks.of(instance)]
    layers, capture = disks.recorded(merged), instance.capture
    if capture is not None and current:
        capture = directories.captured_here(capture, directory, layers)
    rooms.store.save(msgspec.structs.replace(instance, disk_layers=layers, capture=capture), durable=True)


async def finish(rooms: Rooms, instance: Instance) -> Instance:
    """End a merge, complete or not: remove the files that the record does not name. Return the record. Idempotent."""
    recorded, _ = await rooms.store.look_up(instance.id)  # it may be ahead of the caller
    directory = rooms.directory(instance.id)
    await in_thread(disks.remove_others, directory, recorded)
    await in_thread(directories.clear_temporaries, directory)
    await in_thread(rooms.store.save, recorded, done=True)
    return recorded
