"""Sessions with a machine, as all processes see them: they keep it from an automatic standby."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from coppice.completion import in_thread
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Observed, Record
from coppice.state import locks

_ACTIVITY: Final = "activity.lock"
_WAIT_S: Final = 60.0


def idle_s(instance: Instance) -> float:
    """Return the seconds after which an idle machine is put into standby; 0: never."""
    return instance.supervision.auto_standby_s if instance.supervision else 0.0


def activity_file(rooms: Rooms, instance: Instance) -> Path:
    """Return the file that sessions with a machine lock shared. Its time is that of the last end."""
    return rooms.directory(instance.id) / _ACTIVITY


def active(rooms: Rooms, instance: Instance) -> AbstractAsyncContextManager[None]:
    """Keep a machine from an automatic standby for a block, in any process.

    :raises Busy: an automatic standby took too long
    """
    return _active(rooms, instance) if idle_s(instance) else contextlib.nullcontext()


@contextlib.asynccontextmanager
async def _active(rooms: Rooms, instance: Instance) -> AsyncIterator[None]:
    path = activity_file(rooms, instance)
    async with locks.hold(path, shared=True, deadline_s=_WAIT_S, what=instance.name):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the machine was removed
                os.utime(path)


class Use(Record, frozen=True, kw_only=True):
    """What keeps a Running machine from an automatic standby."""

    in_use: bool  # a session is open, in any process
    connections: int  # to its published ports that are open
    last: float | None  # its start or its latest known use; None: both are of another time
    held_until: float | None

    def due(self, now: float, limit_s: float) -> float:
        """Return when the machine may be put into standby."""
        last = now if self.in_use or self.connections or self.last is None else self.last
        return max(last + limit_s, self.held_until or 0.0)


async def use_of(rooms: Rooms, instance: Instance, seen: Observed, now: float) -> Use:
    """Look at a Running machine. Its guest is not asked.

    :raises HostCannot: its connections cannot be counted
    """
    path, limit = activity_file(rooms, instance), idle_s(instance)
    times = (instance.started_at, seen.active_at, await in_thread(_changed_at, path))
    return Use(
        in_use=await in_thread(locks.is_held, path),  # nobody used the machine yet if there is no file
        connections=await rooms.networks.of(instance.machine).connections(instance),
        last=max((at for at in times if at and at <= now + limit), default=None),  # a later one: the clock was set back
        held_until=await in_thread(rooms.store.supervised.held_until, instance.id, now),
    )


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
