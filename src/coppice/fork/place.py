"""Make a child's directory. Blocks."""

from __future__ import annotations

from pathlib import Path

from coppice.fork.plan import takes_memory
from coppice.machine import directory as directories
from coppice.machine.rooms import Rooms
from coppice.model import Instance, State


def place(rooms: Rooms, origin: Path, source: Instance, child: Instance, target: State) -> directories.Placed:
    """Make the directory of a child of `source`, whose files are in `origin`: links and clones.

    The child gets the memory only if `target` needs it (see `takes_memory`). The contents of one that is not started
    are durable on return, but not the name of its directory: its record can become durable at any moment.

    :raises IntegrityError: the source's files have changed since the capture
    :raises NoSpace: the disk is full
    """
    directory = rooms.directory(child.id)
    with_memory = takes_memory(source, target)
    if with_memory:
        directories.require_current(origin, source)
    directories.create(directory)
    placed = directories.place_fork(
        origin,
        directory,
        source,
        with_memory=with_memory,
        starts=target is State.RUNNING,
        drivers=(rooms.driver(source), rooms.driver(child)),
        overlays=rooms.overlays,
    )
    if target is not State.RUNNING:
        # The memory of a recorded source is durable, so links to it need no sync.
        directories.make_contents_durable(directory, child.machine, of_durable=source.stem_of is None)
    return placed
