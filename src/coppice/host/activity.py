"""Sessions with a machine, as all processes see them: they keep it from an automatic standby."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from coppice.machine.rooms import Rooms
from coppice.model import Instance
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
