"""A supervisor in the test's loop, and waits for what it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from coppice.client import AsyncHost
from coppice.errors import NotFound
from coppice.host.supervisor import Supervisor
from coppice.model import Instance, State
from coppice.model.events import Event
from coppice.requests import EventsRequest, GetRequest
from fakes.clock import FakeClock

SOON_S = 20.0


@contextlib.asynccontextmanager
async def supervised(host: AsyncHost, clock: FakeClock) -> AsyncIterator[None]:
    """Supervise a host for a block."""
    task = asyncio.create_task(Supervisor(host.local, clock).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def event_of(host: AsyncHost, wanted: Callable[[Event], bool], after: int = 0) -> Event:
    """Return the first event that is wanted, also one that was before, or fail."""
    async with asyncio.timeout(SOON_S), host.stream(EventsRequest(after=after, follow=True)) as events:
        async for event in events:
            if wanted(event):
                return event
    raise AssertionError("the events ended")


async def until_state(host: AsyncHost, name: str, state: State) -> Instance:
    """Wait until an instance is in a state."""

    async def reached() -> Instance:
        async with host.stream(EventsRequest(follow=True)) as events:
            while (found := await host.call(GetRequest(instance=name))).state is not state:
                await anext(events)
            return found

    async with asyncio.timeout(SOON_S):
        return await reached()


async def until_removed(host: AsyncHost, name: str) -> None:
    """Wait until an instance is removed."""
    await event_of(host, lambda event: event.kind == "removed" and event.name == name)


async def exists(host: AsyncHost, name: str) -> bool:
    """Return whether there is an instance of this name."""
    try:
        await host.call(GetRequest(instance=name))
    except NotFound:
        return False
    return True


async def scheduled(host: AsyncHost, name: str) -> float:
    """Wait until the next attempt has its time, and return that."""
    await until_state(host, name, State.STOPPED)
    async with asyncio.timeout(SOON_S):
        while True:
            found = await host.call(GetRequest(instance=name))
            assert found.observed is not None
            if found.observed.next_attempt_at is not None:
                return found.observed.next_attempt_at
    raise AssertionError("it was not scheduled")
