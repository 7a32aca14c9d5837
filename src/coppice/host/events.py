"""The use case that reads events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from coppice.completion import in_thread
from coppice.host.base import UseCases
from coppice.model.events import Event
from coppice.requests import EventsRequest

_POLL_S = 0.1  # SQLite does not report the commits of other processes


class Events(UseCases):
    """The stream of events."""

    @contextlib.asynccontextmanager
    async def events(self, request: EventsRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """Read the log, and follow it if requested."""
        log = self.rooms.store.events
        after = request.after
        if after is None:
            after = await in_thread(log.newest) if request.follow else 0
        async with contextlib.aclosing(self._events(after, follow=request.follow)) as events:
            yield events

    async def _events(self, after: int, *, follow: bool) -> AsyncGenerator[Event, None]:
        while True:
            events, last = await in_thread(self.rooms.store.events.after, after, self.owner)
            for event in events:
                yield event
            if last == after:
                if not follow:
                    return
                await asyncio.sleep(_POLL_S)
            after = last
