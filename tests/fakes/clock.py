"""A clock that tests set."""

from __future__ import annotations

import asyncio
import time

from coppice.host.supervisor import Clock


class FakeClock(Clock):
    """Begins with this host's time, because records have it, and stands still until it is set
    forward.
    """

    def __init__(self) -> None:
        self._now = time.time()
        self._moved = asyncio.Event()

    def now(self) -> float:
        return self._now

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds
        self._moved.set()
        self._moved = asyncio.Event()

    def back(self, seconds: float) -> None:
        """Set the clock back. That ends waits, as a real wait ends within a minute."""
        self.forward(-seconds)

    async def wait(self, event: asyncio.Event, until: float) -> None:
        """Wait in real time for the event, and in this clock's time for `until`."""
        begin = self._now
        while begin <= self._now < until and not event.is_set():
            waiting = [asyncio.ensure_future(each.wait()) for each in (event, self._moved)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waiting:
                    each.cancel()
