"""How many spares a host keeps, of which template, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError, UsageError
from coppice.fork import spare as spares
from coppice.fork.plan import ForkRequest
from coppice.fork.spare import Spare
from coppice.instance.rooms import Rooms
from coppice.model import Instance

_log = logging.getLogger(__name__)

IDLE_S = 30.0
"""So long after a host's latest fork of a template another one is expected, and a spare is kept."""
MOST = 16
"""Spares of a host, of all templates together."""

Holding = Callable[[str], AbstractAsyncContextManager[Instance]]


def check_spares(limit: int) -> int:
    """Validate a number of spares of one template.

    :raises UsageError: it can never be
    """
    if not 0 <= limit <= MOST:
        raise UsageError(f"a host cannot keep {limit} spares of a template", hint=f"use 0 to {MOST}")
    return limit


class Spares:
    """The spares of one opened host, `limit` at most of one template. Where none can be had, forks start their VMMs themselves: nothing fails."""

    def __init__(
        self, rooms: Rooms, limit: int, hold_template: Holding, require_room: Callable[[Instance], None]
    ) -> None:
        """`require_room` refuses one more spare of a template; it blocks."""
        self._rooms = rooms
        self._limit = limit
        self._hold_template = hold_template
        self._require_room = require_room
        self._ready: list[Spare] = []
        self._expected: dict[str, asyncio.TimerHandle] = {}  # templates that may be forked again: until when
        self._filling: dict[str, asyncio.Task[None]] = {}
        self._removing: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()  # or two that count what is there would start one each for the last place

    @contextlib.contextmanager
    def taken(self, source: Instance, request: ForkRequest) -> Iterator[list[Spare]]:
        """Spares for the children of a fork, as far as there are any. What has not become a child at the end of the block is removed."""
        mine: list[Spare] = []
        if spares.serves(self._rooms, source, request):
            self._remove_soon([each for each in self._of(source.id) if not self._is_good(each, source)])
            mine = self._of(source.id)[: request.count]
            self._ready = [each for each in self._ready if each not in mine]
        try:
            yield mine
        finally:
            self._remove_soon(mine)

    def _of(self, source_id: str) -> list[Spare]:
        return [each for each in self._ready if each.source == source_id]

    def _is_good(self, spare: Spare, source: Instance) -> bool:
        return spare.is_of(source) and self._rooms.driver.alive(spare.process)

    def forked(self, source: Instance, request: ForkRequest) -> None:
        """A fork has been made: the second within some time lets a third be expected. Does not wait, and cannot fail."""
        if self._limit == 0 or not spares.serves(self._rooms, source, request):
            return
        if self._expect(source.id) and source.id not in self._filling:
            task = self._filling[source.id] = asyncio.create_task(self._fill(source.id))
            task.add_done_callback(lambda _: self._filling.pop(source.id))

    def _expect(self, source_id: str) -> bool:
        """Expect a fork for some time from now; tell whether one was expected already."""
        before = self._expected.pop(source_id, None)
        self._expected[source_id] = asyncio.get_running_loop().call_later(IDLE_S, self._forget, source_id)
        if before is not None:
            before.cancel()
        return before is not None

    async def _fill(self, source_id: str) -> None:
        try:
            async with self._hold_template(source_id) as source:
                await self._start(source, self._limit)
        except (CoppiceError, OSError) as error:
            _log.info("no VMM is started ahead: %s", error)

    async def prepare(self, source: Instance, count: int) -> int:
        """Start VMMs until `count` wait for forks of a template, which the caller holds locked (shared); return how many do.

        :raises CoppiceError: one could not be started
        """
        self._expect(source.id)
        await self._start(source, count)
        return len(self._of(source.id))

    async def _start(self, source: Instance, count: int) -> None:
        async with self._one_at_a_time:
            while len(self._of(source.id)) < count and len(self._ready) < MOST:
                await in_thread(self._require_room, source)
                spare = await spares.prepare(self._rooms, source)
                self._ready.append(spare)
                if source.id not in self._expected:  # it took too long
                    self._remove_soon(self._of(source.id))
                    return

    def _forget(self, source_id: str) -> None:
        del self._expected[source_id]
        self._remove_soon(self._of(source_id))

    def _remove_soon(self, removed: list[Spare]) -> None:
        """Remove what has not become a fork."""
        self._ready = [each for each in self._ready if each not in removed]
        for each in removed:
            if each.lock is not None:
                task = asyncio.create_task(self._remove(each))
                self._removing.add(task)
                task.add_done_callback(self._removing.discard)

    async def _remove(self, spare: Spare) -> None:
        try:
            await complete(spares.discard(self._rooms, spare))
        except (CoppiceError, OSError) as error:
            _log.warning("a VMM that was started ahead is not removed: %s; `coppice gc` does it", error)

    async def drop(self, source_id: str) -> None:
        """Remove the spares of what is a template no longer."""
        if (timer := self._expected.pop(source_id, None)) is not None:
            timer.cancel()
            self._remove_soon(self._of(source_id))  # what is just being started is expected no more: it goes too
            if (filling := self._filling.get(source_id)) is not None:
                filling.cancel()
                await asyncio.wait({filling})
            await self._gone()

    async def _gone(self) -> None:
        while self._removing:
            await asyncio.wait(self._removing)  # not `gather`, which would cancel them with whoever waits

    async def give_way(self) -> None:
        """Remove all that wait: what is asked for goes before what is only expected."""
        self._remove_soon(self._ready)
        await self._gone()

    async def settled(self) -> None:
        """Wait until all that is being started ahead runs, and all that is being removed is gone."""
        while self._filling:
            await asyncio.gather(*self._filling.values(), return_exceptions=True)
        await self._gone()

    async def close(self) -> None:
        """Remove all spares. Idempotent."""
        await complete(self._close())

    async def _close(self) -> None:
        for timer in self._expected.values():
            timer.cancel()
        self._expected.clear()
        for task in self._filling.values():
            task.cancel()
        await self.settled()
        self._remove_soon(self._ready)
        await self.settled()
