"""Run a coroutine to its end. A signal cancels it, and the program ends after its cleanup."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from coppice.cli.ending import Interrupted

T = TypeVar("T")
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Router:
    """Passes a signal to the latest handler, or by default cancels the task."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self.received: list[int] = []
        self.handler: Callable[[int], None] = self.end

    def route(self, number: int) -> None:
        self.handler(number)

    def end(self, number: int) -> None:
        """Cancel the task. The third signal kills the process; the next command cleans up."""
        self.received.append(number)
        if len(self.received) < 3:
            self._task.cancel()
            return
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


_router: ContextVar[_Router] = ContextVar("router")


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in a new event loop, and return its result.

    SIGINT, SIGTERM and SIGHUP cancel the work and wait for its cleanup; the third signal kills the
    process. Ignored signals, as under `nohup`, stay ignored.

    :raises Interrupted: a signal ended the work
    """
    routers: list[_Router] = []

    async def whole() -> T:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a running coroutine has one
        router = _Router(task)
        routers.append(router)
        _router.set(router)
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, router.route, number)
        return await work

    try:
        return asyncio.run(whole())
    except asyncio.CancelledError as error:
        if not (routers and routers[0].received):
            raise
        raise Interrupted(routers[0].received[0]) from error


@contextlib.contextmanager
def signals_to(handler: Callable[[int, Callable[[int], None]], None]) -> Iterator[None]:
    """During a block, call `handler` with each signal, and with the function that ends the work."""
    router = _router.get()
    router.handler = lambda number: handler(number, router.end)
    try:
        yield
    finally:
        router.handler = router.end
