"""Run coroutines from blocking code: an event loop in a thread, and calls that wait for its
results.

An interrupt of such a call, such as Ctrl-C, cancels the coroutine and waits for its cleanup. Only
then the interrupt is raised, so nothing is left half-made.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from coppice.errors import UsageError

T = TypeVar("T")


class Result(Generic[T]):
    """What the loop's thread hands to the caller's thread.

    A `concurrent.futures.Future` will not do: an interrupt that comes right after its caller has
    taken its lock leaves the lock taken, and the thread that sets the result waits for ever. Here
    the caller waits in one call of C.
    """

    def __init__(self) -> None:
        self.done = False
        self._was_set: SimpleQueue[None] = SimpleQueue()
        self._values: list[T] = []
        self._error: BaseException | None = None

    def set(self, value: T) -> None:
        """Hand over a value."""
        self._values.append(value)
        self._end()

    def fail(self, error: BaseException) -> None:
        """Hand over an error."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self.done = True
        self._was_set.put(None)

    def wait(self) -> None:
        """Wait until it is done. For one thread at a time."""
        if not self.done:
            self._was_set.get()

    def get(self) -> T:
        """Wait, and return the value or raise the error."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._values[0]


class _Job(Generic[T]):
    """A coroutine to run in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self.outcome: Result[T] = Result()

    def run(self, part: Result[Any] | None = None) -> Any:
        """Begin, and wait as `wait` does.

        One call does both: an interrupt between the two would leave the coroutine running.
        """
        return self.wait(part, begin=True)

    def wait(self, part: Result[Any] | None = None, *, begin: bool = False) -> Any:
        """Return the outcome of the work, or of a part of it.

        If the wait is interrupted, cancel the work and wait for its cleanup.
        """
        awaited = part or self.outcome
        try:
            if begin:
                self._loop.call_soon_threadsafe(self._begin)
            return awaited.get()
        except BaseException:
            # Even if the part is done: its caller does not get the result, and would not end the
            # rest.
            if not self.outcome.done:
                self._loop.call_soon_threadsafe(self._cancel)
                self.outcome.wait()
            raise

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.outcome.fail(asyncio.CancelledError())
        elif error := task.exception():
            self.outcome.fail(error)
        else:
            self.outcome.set(task.result())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:  # interrupted before `_begin` was scheduled: the loop runs its callbacks in order
            self._work.close()
            self.outcome.fail(asyncio.CancelledError())


class Portal:
    """An event loop in a thread. It runs from the first call until `close`."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, and return its result."""
        result: T = self._job(work).run()
        return result

    @contextlib.contextmanager
    def within(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Keep an asynchronous context manager open for a block. The same task enters and leaves
        it.
        """
        entered: Result[tuple[T, asyncio.Future[BaseException | None]]] = Result()

        async def hold() -> None:
            try:
                async with manager as value:
                    left: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
                    entered.set((value, left))
                    if (error := await left) is not None:
                        raise error
            except BaseException as error:
                if not entered.done:
                    entered.fail(error)
                raise

        job = self._job(hold())
        value, left = job.run(entered)
        failure: BaseException | None = None
        try:
            yield value
        except BaseException as error:
            failure = error
            raise
        finally:
            # Inside the loop, KeyboardInterrupt and the like would end the loop itself. Cancel
            # instead.
            told = failure if failure is None or isinstance(failure, Exception) else asyncio.CancelledError()
            if not job.outcome.done:  # closing the portal has ended it
                left.get_loop().call_soon_threadsafe(left.set_result, told)
            try:
                job.wait()
            except BaseException as error:
                if error is not told and not (told is not None and isinstance(error, asyncio.CancelledError)):
                    raise

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """Yield the items of an asynchronous iterator. Wait for each item when it is requested."""
        loop = self._running_loop()
        end = object()

        async def following() -> T | object:
            return await anext(items, end)

        async def close() -> None:
            if isinstance(items, AsyncGenerator):
                await items.aclose()

        try:
            while (item := self.call(following())) is not end:
                yield item  # type: ignore[misc] # `end` was the only object that is no T
        finally:
            # This may be the garbage collector, in any thread and much later. A closed portal has
            # ended its iterators, and a call would start a thread that nobody ends. In its own
            # thread, the loop closes what is collected.
            if self._loop is loop and threading.current_thread() is not self._thread:
                self.call(close())

    def close(self) -> None:
        """Cancel running coroutines and end the thread. Idempotent."""
        with self._guard:
            thread, loop, self._thread, self._loop = self._thread, self._loop, None, None
        if thread is not None and loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._guard:
            if self._thread is None or self._loop is None:
                started: Result[asyncio.AbstractEventLoop] = Result()
                self._thread = threading.Thread(target=_run_loop, args=(started,), name="coppice-host", daemon=True)
                self._thread.start()
                self._loop = started.get()
            elif not self._thread.is_alive():  # a forked process does not inherit threads
                raise UsageError(
                    "this host belongs to the parent of this forked process", hint="open another host in this process"
                )
            if threading.current_thread() is self._thread:
                raise UsageError(
                    "cannot call the host from its own thread, such as from a progress sink: the call would deadlock",
                    hint="call it from another thread, or use AsyncHost",
                )
            return self._loop

    def _job(self, work: Coroutine[Any, Any, T]) -> _Job[T]:
        try:
            return _Job(self._running_loop(), work)
        except UsageError:
            work.close()
            raise


def _run_loop(started: Result[asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        started.set(loop)
        loop.run_forever()
