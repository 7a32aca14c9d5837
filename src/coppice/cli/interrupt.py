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
    """Passes each signal to the latest handler, or by default cancels the task."""

    def __init__(self) -> None:
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._early: list[int] = []
        self.received: list[int] = []
        self.handler: Callable[[int], None] = self.end

    async def follow(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work in the current task, which gets the signals from now on."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a running coroutine has one
        self._running = asyncio.get_running_loop(), task
        _router.set(self)
        for number in self._early:
            self._route(number)
        return await work

    def receive(self, number: int, _: object) -> None:
        """Take a signal. Python calls this between any two steps of the main thread."""
        if self._running is None:
            self._early.append(number)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the work has ended
            self._running[0].call_soon_threadsafe(self._route, number)

    def _route(self, number: int) -> None:
        self.handler(number)

    def end(self, number: int) -> None:
        """Cancel the task. The third signal kills the process; the next command cleans up."""
        self.received.append(number)
        if len(self.received) < 3:
            if self._running is not None:
                self._running[1].cancel()
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
    router = _Router()
    before = {number: found for number in _ENDING if (found := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        # Not `loop.add_signal_handler`: it imports `inspect`, which takes milliseconds.
        signal.signal(number, router.receive)
        signal.siginterrupt(number, False)
    try:
        return asyncio.run(router.follow(work))
    except asyncio.CancelledError as error:
        if not router.received:
            raise
        raise Interrupted(router.received[0]) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_to(handler: Callable[[int, Callable[[int], None]], None]) -> Iterator[None]:
    """During a block, call `handler` with each signal, and with the function that ends the work."""
    router = _router.get()
    router.handler = lambda number: handler(number, router.end)
    try:
        yield
    finally:
        router.handler = router.end
