"""Make forks that are not started durable and record them, many at once.

An fsync of a new file makes the file system write its journal, with the new files of all forks so
far. So the first fork of a group pays, and the fsyncs of the others find nothing to do.
"""

from __future__ import annotations

import asyncio

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError
from coppice.linux.files import os_errors, sync
from coppice.machine import directory as directories
from coppice.machine.rooms import Rooms
from coppice.model import Instance
from coppice.state.store import gone


class Resting:
    """Collects the placed forks of one fan-out. While one group is being synced, the next one gathers.

    :param of_durable: their source's memory is durable: it has been recorded, so it was synced
    :param done: also end their operations in the journal
    """

    def __init__(self, rooms: Rooms, *, of_durable: bool, done: bool) -> None:
        self._rooms = rooms
        self._of_durable = of_durable
        self._done = done
        self._waiting: list[tuple[Instance, asyncio.Future[CoppiceError | None]]] = []
        self._working: asyncio.Task[None] | None = None

    async def record(self, fork: Instance) -> None:
        """Make the fork's files durable, then write its record. If this task is cancelled, do so first.

        :raises NoSpace: the disk is full
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
            forks = [fork for fork, _ in group]
            try:
                outcomes = await in_thread(self._settle, forks)
                for (_, outcome), result in zip(group, outcomes, strict=True):
                    outcome.set_result(result)
            except BaseException as error:
                for _, outcome in group:
                    outcome.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    def _settle(self, forks: list[Instance]) -> list[CoppiceError | None]:
        """Sync and record; return the failure of each. Blocks."""
        failures: dict[str, CoppiceError] = {}
        for fork in forks:
            try:
                directories.make_contents_durable(
                    self._rooms.directory(fork.id), fork.machine, of_durable=self._of_durable
                )
            except CoppiceError as error:
                failures[fork.id] = error
        synced = [fork for fork in forks if fork.id not in failures]
        with os_errors("make the directories of forks durable"):
            sync(self._rooms.layout.instances)
        missing = self._rooms.store.save_all(synced, done=self._done)
        failures |= {fork.id: gone(fork) for fork in synced if fork.id in missing}
        return [failures.get(fork.id) for fork in forks]
