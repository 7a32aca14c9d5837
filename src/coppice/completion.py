"""Run blocking work in threads, and complete cleanup despite a cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from coppice import stopping

P = ParamSpec("P")
T = TypeVar("T")
_AT_ONCE = 64


class QuickCalls:
    """Base of classes whose methods block for milliseconds, such as those of the database.

    `in_thread` runs them in separate threads, so that none queues behind long copies.
    """


_QUICK_THREADS = 4
_LONG_THREADS = min(32, (os.cpu_count() or 1) + 4)


class Work(Generic[T]):
    """Blocking work in a thread for the running loop. All but `carry_out` belongs to the loop's own thread.

    `concurrent.futures` does the same for twice the CPU time, and each operation has several such works.
    """

    def __init__(self, call: Callable[[], T], ended: Callable[[], None] = lambda: None) -> None:
        """`ended` is called in the loop at the end of the work."""
        self._call = call
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._value: T
        self.done = False
        self.error: BaseException | None = None

    def carry_out(self) -> None:
        """Do the work, in the thread."""
        try:
            self._value = self._call()
        except BaseException as error:
            self.error = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any longer
            self._loop.call_soon_threadsafe(self._wake)
        del self  # the error's traceback refers to this frame, and the work to the error

    def _wake(self) -> None:
        self.done = True
        self._ended()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Wait once for the end. A cancellation ends the wait, not the work."""
        self._waiter = self._loop.create_future()
        await self._waiter

    def result(self) -> T:
        """Return the result of work that is done, or raise its error."""
        try:
            if self.error is not None:
                raise self.error
            return self._value
        finally:
            del self  # as in `carry_out`


class _Threads:
    """Threads that carry out the work of one loop, in order. They end with the loop."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._started = self._busy = 0
        self._queue: queue.SimpleQueue[Work[Any] | None] = queue.SimpleQueue()

    def submit(self, call: Callable[[], T]) -> Work[T]:
        """Start the work, or let it wait for one of the threads.

        :raises RuntimeError: there is no thread, and none can be started
        """
        if self._started <= self._busy and self._started < self._most:
            number = self._started + 1
            thread = threading.Thread(target=_serve, args=(self._queue,), name=f"{self._name}_{number}", daemon=True)
            try:
                thread.start()
                self._started = number
            except RuntimeError:  # the limit of processes: the threads that there are do the work
                if not self._started:
                    raise
        work = Work(call, self._freed)
        self._busy += 1
        self._queue.put(work)
        return work

    def _freed(self) -> None:
        self._busy -= 1

    def __del__(self) -> None:
        for _ in range(self._started):
            self._queue.put(None)


def _serve(works: queue.SimpleQueue[Work[Any] | None]) -> None:
    while (work := works.get()) is not None:
        work.carry_out()
        del work  # it refers to the loop, with which this thread ends


_threads: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[_Threads, _Threads]] = weakref.WeakKeyDictionary()


def submit(call: Callable[[], T], *, quick: bool = False) -> Work[T]:
    """Start blocking work in a thread of the running loop.

    :param quick: the work blocks for milliseconds; other threads are reserved for such work
    """
    loop = asyncio.get_running_loop()
    threads = _threads.get(loop)
    if threads is None:
        threads = _threads[loop] = _Threads(_LONG_THREADS, "coppice"), _Threads(_QUICK_THREADS, "coppice-quick")
    return threads[quick].submit(call)


async def ended(work: Work[T], *, on_cancel: Callable[[], None] = lambda: None) -> T:
    """Await the end of work in a thread, as `complete` does; return its result."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done:  # asked each time: a caller that is cancelled in each turn of the loop sees no wait end
        try:
            await work.wait()
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    try:
        if cancelled is not None:
            raise cancelled
        return work.result()
    finally:
        del work, cancelled  # the error's traceback would refer to this frame, and the frame to the error


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread of the loop.

    If this task is cancelled, stop the work (see `stopping`) and wait until it ends.

    `asyncio.to_thread` alone would let the caller clean up while the thread still works.
    """
    stop = threading.Event()
    quick = isinstance(getattr(function, "__self__", None), QuickCalls)
    return await ended(submit(partial(stopping.run, stop, function, *args, **kwargs), quick=quick), on_cancel=stop.set)


async def in_own_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run work that may take minutes as `in_thread` does, in a new thread.

    The loop has few threads, and all operations need them: a few builds would block the rest.
    """
    stop = threading.Event()
    return await ended(_alone(partial(stopping.run, stop, function, *args, **kwargs)), on_cancel=stop.set)


def _alone(call: Callable[[], T]) -> Work[T]:
    work = Work(call)
    threading.Thread(target=work.carry_out, name="coppice-work", daemon=True).start()
    return work


async def beside(side: Coroutine[Any, Any, None], main: Coroutine[Any, Any, T]) -> T:
    """Return the result of `main`. `side` runs next to it, and is cancelled at its end. An error of
    `side` ends `main`.
    """
    helping, working = asyncio.create_task(side), asyncio.create_task(main)
    try:
        await asyncio.wait({helping, working}, return_when=asyncio.FIRST_COMPLETED)
        if helping.done():
            helping.result()  # raises
        return await working
    finally:
        helping.cancel()
        working.cancel()
        await asyncio.wait({helping, working})


@contextlib.asynccontextmanager
async def later(seconds: float, side: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run `side` next to a block that lasts longer than `seconds`, and cancel it at its end.

    A shorter block, as most are, has no task.
    """
    started: list[asyncio.Task[None]] = []
    timer = asyncio.get_running_loop().call_later(seconds, lambda: started.append(asyncio.create_task(side())))
    try:
        yield
    finally:
        timer.cancel()
        for task in started:
            task.cancel()
        if started:
            await asyncio.gather(*started, return_exceptions=True)


async def both(one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None]) -> None:
    """Await both to their ends. The first error cancels the other one, and is raised."""
    tasks = asyncio.create_task(one), asyncio.create_task(other)
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def complete(work: Awaitable[T]) -> T:
    """Await `work` to its end, even if this task is cancelled meanwhile; raise the cancellation
    afterwards.

    With `asyncio.shield` alone, the caller would go on (and free its locks) while the work still
    runs.
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
            break  # the work's own cancellation: raised below
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # marks the error as retrieved: the cancellation takes precedence
        raise cancelled
    return task.result()


async def each_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T | BaseException]:
    """Await all concurrently, each to its end; return their results and errors, in order.

    The limit on open files bounds the concurrency: each removal of a machine holds a lock file and
    a descriptor that reports the end of the VMM.
    """
    slots = asyncio.Semaphore(_AT_ONCE)

    async def in_turn(work: Coroutine[Any, Any, T]) -> T:
        try:
            async with slots:
                return await work
        finally:
            work.close()  # cancelled before its turn

    return await asyncio.gather(*map(in_turn, works), return_exceptions=True)


async def all_of(works: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Await all, as `each_of` does; then raise the first error.

    `asyncio.gather` would return at the first error, while the others still run.
    """
    for outcome in await each_of(works):
        if isinstance(outcome, BaseException):
            raise outcome
