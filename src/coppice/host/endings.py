"""Learn of the ends of machines' processes as they happen, for a supervisor.

The console of each Running machine is watched. When it grows, the agent is asked, once a second at
most (see `coppice.host.process`). This needs no connection to a guest that says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Final

from coppice.errors import CoppiceError, NotFound
from coppice.host import process
from coppice.linux.inotify import Watches
from coppice.machine.rooms import Rooms
from coppice.model.ownership import owns
from coppice.vmm import driver as files

_log = logging.getLogger(__name__)
_CALM_S: Final = 1.0  # between two questions to the same machine
_AGAIN_S: Final = 10.0  # after a question without an answer
_AT_ONCE: Final = 16


class Endings:
    """The Running machines of one data directory, or of one owner in it."""

    def __init__(self, rooms: Rooms, owner: str | None) -> None:
        self._rooms = rooms
        self._owner = owner
        self._files: Watches | None = None
        self._watches: dict[str, int] = {}  # by the id of the machine
        self._keys: dict[int, str] = {}  # the other way around
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._slots = asyncio.Semaphore(_AT_ONCE)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Ask machines whose consoles grow, for a block. Then call `close`."""
        loop = asyncio.get_running_loop()
        with Watches() as self._files:
            loop.add_reader(self._files, self._grown, self._files)
            try:
                yield
            finally:
                loop.remove_reader(self._files)
                self._files = None
                self._watches.clear()
                self._keys.clear()

    async def close(self) -> None:
        """Cancel the questions under way, and wait for their end."""
        self._again.clear()
        tasks = tuple(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def follow(self, running: Iterable[str]) -> None:
        """Watch machines that are Running now. One that has news already is asked at once."""
        for key in running:
            directory = self._rooms.directory(key)
            if self._files is None or key in self._watches:
                continue
            try:
                watch = self._files.add(directory / files.CONSOLE_LOG)
            except CoppiceError as error:  # it was removed, or this user has no watch left
                _log.info("the end of the process of %s is noticed late: %s", key, error)
            else:
                self._watches[key], self._keys[watch] = watch, key
            if process.has_news(directory):
                self._ask(key)

    def drop(self, others: Iterable[str]) -> None:
        """Watch machines no longer."""
        for key in others:
            self._again.discard(key)
            watch = self._watches.pop(key, None)
            if watch is not None and self._files is not None:
                self._keys.pop(watch, None)
                self._files.remove(watch)

    def _grown(self, watches: Watches) -> None:
        changed = watches.changed()
        for key in [*self._watches] if -1 in changed else [self._keys[each] for each in changed & self._keys.keys()]:
            self._ask(key)

    def _ask(self, key: str) -> None:
        if key in self._asking:
            self._again.add(key)
        else:
            self._asking[key] = asyncio.create_task(self._look(key), name=f"process of {key}")

    async def _look(self, key: str) -> None:
        try:
            pause = await self._learn(key)
            if pause is not None:
                await asyncio.sleep(pause)
        finally:
            del self._asking[key]
        if key in self._again:
            self._again.discard(key)
            self._ask(key)

    async def _learn(self, key: str) -> float | None:
        """Ask a machine and record its answer. Return the time until it may be asked again; None: it has ended."""
        try:
            instance, _ = await self._rooms.store.look_up(key)
            if not process.may_end(instance) or not owns(self._owner, instance):
                self.drop((key,))
                return None
            async with self._slots:
                if (end := await process.ask(self._rooms, instance)) is None:
                    return _CALM_S
            if process.may_end(await process.record(self._rooms, instance, end)):  # it is another run already
                self._again.add(key)
                return _CALM_S
        except NotFound:
            self.drop((key,))
            return None
        except CoppiceError as error:  # it is silent, busy, or being captured
            _log.debug("cannot learn of the end of the process of %s: %s", key, error)
            self._again.add(key)
            return _AGAIN_S
        self.drop((key,))
        return None
