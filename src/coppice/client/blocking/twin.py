"""The base of the blocking twins: the asynchronous object, and the thread of its event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from coppice.client.portal import Portal

if TYPE_CHECKING:
    from coppice.client.aio.forks import AsyncForks
    from coppice.client.aio.machine import AsyncMachine
    from coppice.client.blocking.forks import Forks
    from coppice.client.blocking.machine import Machine

A = TypeVar("A")


class Twin(Generic[A]):
    """An object whose methods wait for those of its asynchronous twin. Any thread may call them."""

    def __init__(self, portal: Portal, twin: A) -> None:
        self._portal = portal
        self._twin = twin

    def _machine(self, twin: AsyncMachine) -> Machine:
        from coppice.client.blocking.machine import Machine

        return Machine(self._portal, twin)

    def _machines(self, twins: list[AsyncMachine]) -> list[Machine]:
        return [self._machine(twin) for twin in twins]

    def _forks(self, twin: AsyncForks) -> Forks:
        from coppice.client.blocking.forks import Forks

        return Forks(self._portal, twin)

    def __repr__(self) -> str:
        return repr(self._twin).replace("Async", "", 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Twin) and bool(other._twin == self._twin)

    def __hash__(self) -> int:
        return hash(self._twin)
