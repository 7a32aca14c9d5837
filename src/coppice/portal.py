"""From blocking code into an event loop: a thread that runs one, and calls that wait for what runs there.

What interrupts a wait, such as Ctrl-C, cancels the work and waits for its cleanup before it goes on: nothing is left half-made.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Job(Generic[T]):
    """A coroutine that is to run in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self._loop = loop
        self._work = work
        self._task: asyncio.Task[T] | None = None
        self.outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run(self, part: concurrent.futures.Future[Any] | None = None) -> Any:
        """Begin, and wait as `wait` does. Both at once: an interrupt between the two would leave work that nobody waits for."""
        return self.wait(part, begin=True)

    def wait(self, part: concurrent.futures.Future[Any] | None = None, *, begin: bool = False) -> Any:
        """The outcome, or that of a part of the work. Interrupted, it cancels the work and waits for its cleanup."""
        awaited = part or self.outcome
        try:
            if begin:
                self._loop.call_soon_threadsafe(self._begin)
            return awaited.result()
        except BaseException:
            # Also where the part is done: whoever asked for it never learns that, and would not end the rest.
            if not self.outcome.done():
                self._loop.call_soon_threadsafe(self._cancel)
                concurrent.futures.wait([self.outcome])
            raise

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.outcome.set_exception(asyncio.CancelledError())
        elif error := task.exception():
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:  # interrupted before it was handed over: the loop takes what it is given in order
            self._work.close()
            self.outcome.set_exception(asyncio.CancelledError())


class Portal:
    """An event loop in a thread, from the first call to `close`."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the work to its end."""
        result: T = self._job(work).run()
        return result

    @contextlib.contextmanager
    def within(self, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """Hold an asynchronous context manager open for the length of a block. One task enters and leaves it."""
        entered: concurrent.futures.Future[tuple[T, asyncio.Future[BaseException | None]]] = concurrent.futures.Future()

        async def hold() -> None:
            try:
                async with manager as value:
                    left: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
                    entered.set_result((value, left))
                    if (error := await left) is not None:
                        raise error
            except BaseException as error:
                if not entered.done():
                    entered.set_exception(error)
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
            # KeyboardInterrupt and the like would end the loop itself: inside of it they are a cancellation.
            told = failure if failure is None or isinstance(failure, Exception) else asyncio.CancelledError()
            left.get_loop().call_soon_threadsafe(left.set_result, told)
            try:
                job.wait()
            except BaseException as error:
                if error is not told and not (told is not None and isinstance(error, asyncio.CancelledError)):
                    raise

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items one by one, each waited for when it is asked for."""
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
            self.call(close())

    def close(self) -> None:
        """Cancel what still runs and end the thread. Idempotent."""
        with self._guard:
            thread, loop, self._thread, self._loop = self._thread, self._loop, None, None
        if thread is not None and loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _job(self, work: Coroutine[Any, Any, T]) -> _Job[T]:
        with self._guard:
            if self._thread is None or self._loop is None:
                started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
                self._thread = threading.Thread(target=_run_loop, args=(started,), name="coppice-host", daemon=True)
                self._thread.start()
                self._loop = started.result()
            elif not self._thread.is_alive():  # threads do not come along into a process that is forked
                work.close()
                raise RuntimeError(
                    "this host was opened by the process that this one was forked from: open another one here"
                )
            if threading.current_thread() is self._thread:
                work.close()
                raise RuntimeError(
                    "this is the host's own thread, as in a progress sink: a call from here would wait for itself"
                )
            return _Job(self._loop, work)


def _run_loop(started: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        started.set_result(loop)
        loop.run_forever()
