"""Spares: VMMs started ahead, with the state of their template loaded and the guest not yet run.

A fork first waits for the start of its VMM, which needs nothing from the fork's caller. A spare has
no record, no name and no identity. It is an instance's directory with a VMM, and the host process
that made it holds its lock. So other processes leave it alone; once that process has ended, the
next one that opens the data directory removes it, like any lock file without a record. `fan_out`
turns a spare into a fork, under the id that the spare was made with.

A spare keeps its links to the memory only until its VMM has mapped it. So the link count is that
of the forks.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import HostCannot
from coppice.fork.place import place
from coppice.machine import activate, destroy
from coppice.machine import directory as directories
from coppice.machine.rooms import Rooms
from coppice.model import Instance, State, VmmProcess
from coppice.names import new_id
from coppice.requests import FanOut
from coppice.state import locks


class Spare(msgspec.Struct, eq=False):
    """One spare of this host process. `lock` is its lock's descriptor, None once given away."""

    id: str
    source: str
    inodes: tuple[int, ...]  # of the mem-file and layers that its VMM has mapped
    bytes_written: int
    disk_layers: Mapping[str, tuple[int, ...]]
    process: VmmProcess
    lock: int | None

    def is_of(self, source: Instance) -> bool:
        """Return whether it has the memory of `source`. A mapped file's inode is not reused."""
        return self.source == source.id and source.capture is not None and source.capture.inodes == self.inodes

    def give_lock(self) -> int:
        """Return the descriptor of its lock, which the caller now owns."""
        if self.lock is None:
            raise AssertionError("a spare becomes one fork")
        descriptor, self.lock = self.lock, None
        return descriptor


def serves(rooms: Rooms, source: Instance, request: FanOut) -> bool:
    """Return whether spares can serve this request: all VMM parameters must be known beforehand."""
    able = rooms.driver(source).capabilities
    return (
        able.restores_paused
        and able.maps_mem_file_privately
        and source.state is State.TEMPLATE
        and request.target is State.RUNNING
        and not request.publish
        and request.limits in (None, source.limits)
        and not source.machine.volumes
    )


async def prepare(rooms: Rooms, source: Instance) -> Spare:
    """Make a spare of a template, whose shared lock the caller holds.

    :raises CoppiceError: the spare could not be made; nothing is left of it
    """
    own = msgspec.structs.replace(source, id=new_id(), publish=())
    # If a sweep has locked the new file first, since it has no record, use another id.
    while (descriptor := locks.try_lock(rooms.layout.lock(own.id))) is None:
        own = msgspec.structs.replace(own, id=new_id())
    directory = rooms.directory(own.id)
    try:
        own = msgspec.structs.replace(own, vmm_user=await in_thread(rooms.store.reserve_user, own.id))
        placed = await in_thread(place, rooms, rooms.directory(source.id), source, own, State.RUNNING)
        if placed.capture is None or placed.capture.copied:
            raise HostCannot(
                f"no spare of {source.name}: its memory cannot be hard-linked",
                hint="keep the data directory on one file system with hard links",
            )
        own = msgspec.structs.replace(own, capture=placed.capture, disk_layers=placed.disk_layers)
        driver = rooms.driver(own)
        process = await driver.restore(await activate.launch(rooms, own), paused=True)
        await driver.is_paused(directory)  # an answer means that the VMM has mapped its memory
        for path in directories.memory_paths(directory, placed.capture):
            await in_thread(path.unlink)
    except BaseException:
        try:
            await complete(destroy.remove_unrecorded(rooms, own.id))
        finally:
            locks.release(descriptor)
        raise
    return Spare(
        own.id, source.id, placed.capture.inodes, placed.bytes_written, placed.disk_layers, process, descriptor
    )


def adopt(rooms: Rooms, spare: Spare, source: Instance) -> directories.Placed:
    """Give a spare its links to the memory, which completes the directory of a fork. Blocks.

    :raises IntegrityError: the source's files have changed since the capture
    """
    origin = rooms.directory(source.id)
    directories.require_current(origin, source)
    if source.capture is None:
        raise AssertionError("a template has a capture")
    directory = rooms.directory(spare.id)
    linked, written = directories.link_memory(origin, directory, source.capture)
    capture = directories.captured_here(linked, directory, spare.disk_layers)
    return directories.Placed(capture, spare.bytes_written + written, spare.disk_layers)


async def discard(rooms: Rooms, spare: Spare) -> None:
    """End and remove a spare that has not become a fork. Idempotent."""
    if spare.lock is not None:
        try:
            await destroy.remove_unrecorded(rooms, spare.id)
        finally:
            if spare.lock is not None:
                locks.release(spare.give_lock())
