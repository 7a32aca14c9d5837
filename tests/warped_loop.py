"""An event loop whose clock jumps: no test waits for a timer, and a hang is an error."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

_THREADS_S = 0.01  # for which the clock waits for threads, which may wait for the loop themselves


class Hang(AssertionError):
    """Nothing can happen any more: no timer runs, no byte is on its way, no thread works."""


class _Selector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0.0
        self.threads = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self.threads and (events := super().select(_THREADS_S)):
            return events
        if timeout is None:
            if self.threads:
                return super().select(None)
            raise Hang("nothing can happen any more")
        self.skipped += timeout
        return events


class WarpedLoop(asyncio.SelectorEventLoop):
    """A loop for tests that have all ends of their sockets in this process."""

    def __init__(self) -> None:
        self._warped = _Selector()
        super().__init__(self._warped)

    def time(self) -> float:
        """Return real time and the time that was skipped."""
        return super().time() + self._warped.skipped

    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run a function in a thread. The clock gives it some real time before each jump."""
        self._warped.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: object) -> None:
        self._warped.threads -= 1


def run_warped(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop whose clock jumps."""
    with asyncio.Runner(loop_factory=WarpedLoop) as runner:
        return runner.run(main)
