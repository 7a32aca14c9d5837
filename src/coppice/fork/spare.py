"""A VMM that is started ahead: the state of its template is loaded, and the guest has not run.

What a fork waits for first is the start of its VMM, which needs nothing that only the fork's caller knows. A spare has no record, no name and no
identity: it is an instance's directory with a VMM, whose lock the host that made it holds. So everybody leaves it alone, and once that host is
gone, whoever opens the data directory removes it, as all that has a lock file and no record. The first that it becomes is a fork like any other, by
`fan_out`, under the id that it was made with.

It has no link of the mem-file while it waits, only until its VMM has mapped it: so the link count tells of forks.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import HostCannot
from coppice.fork.place import place
from coppice.fork.plan import ForkRequest
from coppice.instance import activate, destroy
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.memory import memfile
from coppice.model import Instance, Sharing, State, VmmProcess
from coppice.names import new_id
from coppice.store import locks
from coppice.vmm import driver as files


@dataclass(eq=False)
class Spare:
    """One spare, in the hands of the host that made it. `lock` is the descriptor of its instance's lock, None once that is somebody else's."""

    id: str
    source: str
    inode: int  # of the mem-file that its VMM has mapped
    bytes_written: int
    process: VmmProcess
    lock: int | None

    def is_of(self, source: Instance) -> bool:
        """Whether it is what a fork of `source` would be now. An inode is not used anew while a VMM maps it."""
        return self.source == source.id and source.mem_file is not None and source.mem_file.inode == self.inode

    def give_lock(self) -> int:
        """The descriptor of its lock, which is the caller's from now on."""
        if self.lock is None:
            raise AssertionError("a spare becomes one fork")
        descriptor, self.lock = self.lock, None
        return descriptor


def serves(rooms: Rooms, source: Instance, request: ForkRequest) -> bool:
    """Whether spares can be forks of this kind: all that a VMM is started with must be known beforehand."""
    able = rooms.driver.capabilities
    return (
        able.restores_paused
        and able.maps_mem_file_privately
        and source.state is State.TEMPLATE
        and request.target is State.RUNNING
        and not request.publish
        and not source.machine.volumes
    )


async def prepare(rooms: Rooms, source: Instance) -> Spare:
    """Make a spare of a template, which the caller holds locked (shared).

    :raises CoppiceError: it could not be made; nothing is left of it
    """
    own = msgspec.structs.replace(source, id=new_id(), publish=())
    # Whoever sweeps may have found the file, without a record, before it was locked: then by another id.
    while (descriptor := locks.try_lock(rooms.layout.lock(own.id))) is None:
        own = msgspec.structs.replace(own, id=new_id())
    directory = rooms.directory(own.id)
    try:
        # Its own record: that of its template, which it is until now.
        placed = await in_thread(place, rooms, rooms.directory(source.id), source, own.id, State.RUNNING)
        if placed.mem_file is None or placed.mem_file.sharing is not Sharing.HARDLINK:
            raise HostCannot(
                "nothing is copied ahead", hint="keep the data directory on one file system with hard links"
            )
        own = msgspec.structs.replace(own, mem_file=placed.mem_file, disk_stamp=directories.disk_stamp(directory))
        await activate.check(rooms, own)
        process = await rooms.driver.restore(activate.launch(rooms, own), paused=True)
        await rooms.driver.is_paused(directory)  # it answers: it has mapped its memory
        await in_thread((directory / files.MEMORY).unlink)
    except BaseException:
        try:
            await complete(destroy.remove_unrecorded(rooms, own.id))
        finally:
            locks.release(descriptor)
        raise
    return Spare(own.id, source.id, placed.mem_file.inode, placed.bytes_written, process, descriptor)


def adopt(rooms: Rooms, spare: Spare, source: Instance) -> directories.Placed:
    """Give a spare its link of the mem-file: all that a fork's directory has is there then. Blocks.

    :raises IntegrityError: the source's files are not what was captured
    """
    origin = rooms.directory(source.id)
    directories.require_current(origin, source)
    own = rooms.directory(spare.id) / files.MEMORY
    mem_file, written = memfile.link(origin / files.MEMORY, own, source.mem_file)
    return directories.Placed(mem_file, spare.bytes_written + written)


async def discard(rooms: Rooms, spare: Spare) -> None:
    """End and remove a spare that has not become a fork. Idempotent."""
    if spare.lock is not None:
        try:
            await destroy.remove_unrecorded(rooms, spare.id)
        finally:
            if spare.lock is not None:
                locks.release(spare.give_lock())
