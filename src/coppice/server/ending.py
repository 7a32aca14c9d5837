"""The end of a server: streams without an end of their own end at once, so that they do not delay it.

Operations under way get a grace instead, because they have an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

from coppice.completion import complete
from coppice.errors import Overloaded

T = TypeVar("T")


async def following(
    items: AsyncIterator[T], ending: asyncio.Event, *, every_s: float | None = None
) -> AsyncGenerator[T | None, None]:
    """Yield items until they or the server end, and None after each silence of `every_s` seconds."""
    over, upcoming = asyncio.ensure_future(ending.wait()), asyncio.ensure_future(_next(items))
    try:
        while True:
            await asyncio.wait({over, upcoming}, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                return
            if not upcoming.done():
                yield None
                continue
            if (found := upcoming.result()) is None:
                return
            yield found
            upcoming = asyncio.ensure_future(_next(items))
    finally:
        over.cancel()
        upcoming.cancel()
        # A lost client cancels this task again and again. The items must not be closed while they are read.
        await complete(asyncio.wait({upcoming}))


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)


async def unless_ending(work: Awaitable[T], ending: asyncio.Event) -> T:
    """Return the result of work that changes nothing. Cancel it if the server ends.

    :raises Overloaded: the server ends; the client may ask the next one
    """
    over, working = asyncio.ensure_future(ending.wait()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({over, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Overloaded("the server is ending", hint="send the request again: the next server will answer it")
        return working.result()
    finally:
        over.cancel()
        working.cancel()
        await complete(asyncio.wait({working}))
