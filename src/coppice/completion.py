"""Cleanup that a cancellation does not cut short."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work with side effects in a thread, to its end, even if this task is cancelled meanwhile.

    A thread cannot be cancelled: `asyncio.to_thread` alone would let the caller clean up while the work still goes on.
    """
    return await complete(asyncio.to_thread(function, *args, **kwargs))


async def in_stoppable_thread(work: Callable[[threading.Event], T]) -> T:
    """Run `work` in a thread; on cancellation set its event, and wait until it has cleaned up."""
    cancelled = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, cancelled))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cancelled.set()
        await complete(asyncio.wait([task]))
        if not task.cancelled():
            task.exception()  # seen: it is the cancellation, or the work was done just before
        raise


async def complete(work: Awaitable[T]) -> T:
    """Await `work` to its end, even if this task is cancelled meanwhile; the cancellation is raised after it.

    Unlike `asyncio.shield` alone, the caller does not go on (and let go of its locks) while the work still runs.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:
            break  # the work's own: raised below
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen, though the cancellation goes first
        raise cancelled
    return task.result()


async def all_of(works: Iterable[Awaitable[object]]) -> None:
    """Await all, side by side, each to its own end; then raise the first error. (`asyncio.gather` returns with the first, while others still work.)"""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
