"""The interface that carries out requests: on this machine, or on a server. Like an httpx
transport.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from coppice.model import ProgressSink, no_progress
from coppice.requests import Request, StreamRequest

R = TypeVar("R")
Removable = TypeVar("Removable", bound=AbstractAsyncContextManager[Any])


class Backend(Protocol):
    """Carries out requests. It is opened before the first request and closed after the last."""

    async def open(self) -> object:
        """Open the backend. Idempotent."""

    async def close(self) -> None:
        """Close the backend. Instances keep running. Idempotent."""

    async def call(self, request: Request[R], progress: ProgressSink = no_progress) -> R:
        """Carry out one operation and return its result."""

    def stream(self, request: StreamRequest[R]) -> AbstractAsyncContextManager[R]:
        """Open a result that is used inside a block: a running command, a log."""


class Opening(Coroutine[Any, Any, Removable]):
    """A pending operation that makes a machine or forks.

    `await` it to keep them. `async with` removes them at the end of the block:

    vm = await host.run("debian")
    async with host.run("debian") as vm: ...
    """

    def __init__(self, work: Coroutine[Any, Any, Removable]) -> None:
        self._work = work
        self._made: Removable | None = None

    def __await__(self) -> Generator[Any, Any, Removable]:
        return self._work.__await__()

    async def __aenter__(self) -> Removable:
        self._made = await self._work
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made is not None:
            await self._made.__aexit__(kind, error, trace)

    def send(self, value: Any) -> Any:
        """Implement Coroutine, so that `asyncio.create_task` accepts this object."""
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        """Implement Coroutine."""
        return self._work.throw(*error)

    def close(self) -> None:
        """Implement Coroutine."""
        self._work.close()
