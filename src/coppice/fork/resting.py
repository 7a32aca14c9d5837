"""Record forks that are not started, many at once. Their files are durable already (see `place`)."""

from __future__ import annotations

import asyncio

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError
from coppice.linux.files import os_errors, sync
from coppice.machine.rooms import Rooms
from coppice.model import Instance
from coppice.state.store import gone


class Resting:
    """Collects the placed forks of one fan-out. While one group is being recorded, the next one gathers.

    :param done: also end their operations in the journal
    """

    def __init__(self, rooms: Rooms, *, done: bool) -> None:
        self._rooms = rooms
        self._done = done
        self._waiting: list[tuple[Instance, asyncio.Future[CoppiceError | None]]] = []
        self._working: asyncio.Task[None] | None = None

    async def record(self, fork: Instance) -> None:
        """Make the name of the fork's directory durable, then write its record. If this task is cancelled, do so first.

        :raises HostCannot: the names cannot be synced
        :raises NotFound: another process has removed the fork
        """
        outcome: asyncio.Future[CoppiceError | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((fork, outcome))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        error = await complete(outcome)
        if error is not None:
            raise error

    async def _work(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                missing = await in_thread(self._settle, [fork for fork, _ in group])
                for fork, outcome in group:
                    outcome.set_result(gone(fork) if fork.id in missing else None)
            except BaseException as error:
                for _, outcome in group:
                    outcome.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    def _settle(self, forks: list[Instance]) -> set[str]:
        """Sync and record; return the ids of forks that another process has removed. Blocks."""
        with os_errors("make the directories of forks durable"):
            sync(self._rooms.layout.instances)
        return self._rooms.store.save_all(forks, done=self._done)
