"""A child's directory. Blocks."""

from __future__ import annotations

from pathlib import Path

from coppice.fork.plan import takes_memory
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.model import Instance, State


def place(rooms: Rooms, origin: Path, source: Instance, child_id: str, target: State) -> directories.Placed:
    """Make the directory of a child of `source`, whose files are at `origin`: links, clones, and the memory where `target` takes it along.

    :raises IntegrityError: the source's files are not what was captured
    :raises NoSpace: the disk is full
    """
    directory = rooms.directory(child_id)
    with_memory = takes_memory(source, target)
    if with_memory:
        directories.require_current(origin, source)
    directories.create(directory)
    return directories.place_fork(
        origin,
        directory,
        source,
        with_memory=with_memory,
        shareable=rooms.driver.capabilities.maps_mem_file_privately,
    )
