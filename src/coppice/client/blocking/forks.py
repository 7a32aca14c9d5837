"""Forks: the forks of one fan-out."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from coppice.client.aio.forks import AsyncForks, ForkSequence
from coppice.client.blocking.machine import Machine
from coppice.client.portal import Portal


class Forks(ForkSequence[Machine]):
    """The forks of one call of `fork`. At the end of a `with` block they are removed.

    The sequence has no failed forks: see `failures` and `report`. With `atomic` a failure is
    raised.
    """

    def __init__(self, portal: Portal, twin: AsyncForks) -> None:
        super().__init__([Machine(portal, each) for each in twin], twin.report)
        self._portal = portal
        self._twin = twin

    def rm(self) -> None:
        """Remove all forks that still exist."""
        self._portal.call(self._twin.rm())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rm()
