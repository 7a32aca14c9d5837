"""The spares of a host: how many VMMs it starts ahead, for which templates, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError
from coppice.fork import spare as spares
from coppice.fork.spare import Spare
from coppice.machine.rooms import Rooms
from coppice.model import Instance
from coppice.names import MAX_SPARES
from coppice.requests import FanOut

_log = logging.getLogger(__name__)

IDLE_S = 30.0
"""Seconds for which a host expects another fork of a template, and keeps its spares."""
_BURST_S = 1.0
Holding = Callable[[str], AbstractAsyncContextManager[Instance]]


class _Rate:
    """How many forks of a template are requested at a time, from the requests of the last `IDLE_S`."""

    def __init__(self) -> None:
        self._requests: deque[tuple[float, int]] = deque()  # times of the loop's clock, and numbers of forks

    def count(self, now: float, forks: int) -> None:
        """Note a request for a number of forks."""
        while self._requests and self._requests[0][0] < now - IDLE_S:
            self._requests.popleft()
        self._requests.append((now, forks))

    @property
    def largest_burst(self) -> int:
        """The most forks within `_BURST_S`, but no more than a host may have spares.

        The largest fan-out counts for no more forks than the second largest: one of 100 forks that
        does not come again must not leave many spares.
        """
        usual = sorted(forks for _, forks in self._requests)[-2] if len(self._requests) > 1 else 1
        first = burst = largest = 0
        for at, forks in self._requests:
            burst += min(forks, usual)
            while self._requests[first][0] < at - _BURST_S:
                burst -= min(self._requests[first][1], usual)
                first += 1
            largest = max(largest, burst)
        return min(largest, MAX_SPARES)


class Spares:
    """The spares of one open host, at most `limit` per template; None follows the rate of forks.

    If no spare can be started, no operation fails: forks start their VMMs themselves.
    """

    def __init__(
        self, rooms: Rooms, limit: int | None, hold_template: Holding, require_budget: Callable[[Instance], None]
    ) -> None:
        """`require_budget` raises NoSpace if one more spare of a template exceeds a budget. It
        blocks.
        """
        self._rooms = rooms
        self._limit = limit
        self._hold_template = hold_template
        self._require_budget = require_budget
        self._ready: list[Spare] = []
        self._rates: dict[str, _Rate] = {}  # by template id, as long as forks are expected
        self._expected: dict[str, asyncio.TimerHandle] = {}  # by template id; the timer ends it
        self._filling: dict[str, asyncio.Task[None]] = {}
        self._removing: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()  # else two tasks could both start the last allowed spare

    @contextlib.contextmanager
    def taken(self, source: Instance, request: FanOut) -> Iterator[list[Spare]]:
        """Take the available spares for the children of a fork.

        A spare that has not become a child at the end of the block is removed.
        """
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
        return spare.is_of(source) and self._rooms.driver(source).alive(spare.process)

    def forked(self, source: Instance, request: FanOut) -> None:
        """Note that a fork was made. After the second one within `IDLE_S`, start spares for the
        next.

        Does not wait, and cannot fail.
        """
        if self._limit == 0 or not spares.serves(self._rooms, source, request):
            return
        expected = self._expect(source.id)
        self._rates.setdefault(source.id, _Rate()).count(asyncio.get_running_loop().time(), request.count)
        if expected and source.id not in self._filling:
            task = self._filling[source.id] = asyncio.create_task(self._fill(source.id))
            task.add_done_callback(lambda _: self._filling.pop(source.id))

    def _expect(self, source_id: str) -> bool:
        """Expect a fork for the next `IDLE_S`. Return whether one was expected already."""
        before = self._expected.pop(source_id, None)
        self._expected[source_id] = asyncio.get_running_loop().call_later(IDLE_S, self._forget, source_id)
        if before is not None:
            before.cancel()
        return before is not None

    def _wanted(self, source_id: str) -> int:
        if self._limit is not None:
            return self._limit
        rate = self._rates.get(source_id)
        return rate.largest_burst if rate else 0

    async def _fill(self, source_id: str) -> None:
        try:
            async with self._hold_template(source_id) as source:
                await self._start(source, self._wanted(source_id))
        except (CoppiceError, OSError) as error:
            _log.info("cannot start a VMM ahead: %s", error)

    async def prepare(self, source: Instance, count: int) -> int:
        """Start VMMs until `count` wait for forks of a template. Return how many wait.

        The caller holds the template's lock (shared).

        :raises CoppiceError: a VMM could not be started
        """
        self._expect(source.id)
        await self._start(source, count)
        return len(self._of(source.id))

    async def _start(self, source: Instance, count: int) -> None:
        async with self._one_at_a_time:
            while len(self._of(source.id)) < count and len(self._ready) < MAX_SPARES:
                await in_thread(self._require_budget, source)
                spare = await spares.prepare(self._rooms, source)
                self._ready.append(spare)
                if source.id not in self._expected:  # expired or dropped while this spare started
                    self._remove_soon(self._of(source.id))
                    return

    def _forget(self, source_id: str) -> None:
        del self._expected[source_id]
        self._rates.pop(source_id, None)
        self._remove_soon(self._of(source_id))

    def _remove_soon(self, removed: list[Spare]) -> None:
        """Start to remove those of these spares that have not become forks."""
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
            _log.warning("cannot remove a VMM that was started ahead: %s; `coppice gc` removes it", error)

    async def drop(self, source_id: str) -> None:
        """Remove the spares of an instance that is no longer a template."""
        self._rates.pop(source_id, None)
        if (timer := self._expected.pop(source_id, None)) is not None:
            timer.cancel()
            self._remove_soon(self._of(source_id))  # `_start` removes a spare that is being started now
            if (filling := self._filling.get(source_id)) is not None:
                filling.cancel()
                await asyncio.wait({filling})
            await self._gone()

    async def _gone(self) -> None:
        while self._removing:
            await asyncio.wait(self._removing)  # `gather` would cancel the removals together with the caller

    async def give_way(self) -> None:
        """Remove all waiting spares, to free their memory for a requested operation."""
        self._remove_soon(self._ready)
        await self._gone()

    async def settled(self) -> None:
        """Wait until all starting spares run, and all spares that are being removed are gone."""
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
