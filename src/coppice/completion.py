"""Cleanup that a cancellation does not cut short."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_AT_ONCE = 64


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work with side effects in a thread, to its end, even if this task is cancelled meanwhile.

    A thread cannot be cancelled: `asyncio.to_thread` alone would let the caller clean up while the work still goes on.
    """
    return await complete(asyncio.to_thread(function, *args, **kwargs))


async def in_stoppable_thread(work: Callable[[threading.Event], T]) -> T:
    """Run `work` in a thread of its own; on cancellation set its event, and wait until it has cleaned up.

    It may last for minutes, and the loop's threads are few, and for everybody: a handful of builds would keep all else waiting.
    """
    cancelled = threading.Event()
    executor = ThreadPoolExecutor(1, "coppice-work")
    task = asyncio.get_running_loop().run_in_executor(executor, work, cancelled)
    executor.shutdown(wait=False)  # it takes no more work, and ends with this
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


async def each_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T | BaseException]:
    """Await all, side by side, each to its own end; return their results and errors, in order.

    Not more at once than a process may have files open for: each removal of a machine has its lock, and what tells of the VMM's end.
    """
    slots = asyncio.Semaphore(_AT_ONCE)

    async def in_turn(work: Coroutine[Any, Any, T]) -> T:
        try:
            async with slots:
                return await work
        finally:
            work.close()  # where it was cancelled before its turn

    return await asyncio.gather(*map(in_turn, works), return_exceptions=True)


async def all_of(works: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Await all, as `each_of` does; then raise the first error. (`asyncio.gather` returns with the first, while others still work.)"""
    for outcome in await each_of(works):
        if isinstance(outcome, BaseException):
            raise outcome
