"""AsyncForks: the forks of one fan-out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar, overload

from coppice.client.aio.machine import AsyncMachine
from coppice.client.backend import Backend
from coppice.completion import all_of, complete
from coppice.errors import NotFound
from coppice.model import ForkReport, ForkResult

M = TypeVar("M")


class ForkSequence(Sequence[M], Generic[M]):
    """The forks that succeeded, in order, and the report of the whole fan-out."""

    def __init__(self, machines: Sequence[M], report: ForkReport) -> None:
        self._machines = tuple(machines)
        self.report = report

    @property
    def failures(self) -> tuple[ForkResult, ...]:
        """The results of the forks that failed; their `error` has the reason."""
        return tuple(result for result in self.report.results if not result.ok)

    def __len__(self) -> int:
        return len(self._machines)

    @overload
    def __getitem__(self, index: int) -> M: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[M, ...]: ...
    def __getitem__(self, index: int | slice) -> M | tuple[M, ...]:
        return self._machines[index]

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"<{type(self).__name__} of {self.report.source_name}: {len(self)}{failed}>"


class AsyncForks(ForkSequence[AsyncMachine]):
    """The forks of one call of `fork`. At the end of an `async with` block they are removed.

    The sequence has no failed forks: see `failures` and `report`. With `atomic` a failure is
    raised.
    """

    def __init__(self, backend: Backend, report: ForkReport) -> None:
        super().__init__([AsyncMachine(backend, record) for record in report.instances], report)

    async def rm(self) -> None:
        """Remove all forks that still exist."""
        await complete(all_of(_gone(fork) for fork in self))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.rm()


async def _gone(fork: AsyncMachine) -> None:
    with contextlib.suppress(NotFound):
        await fork.rm()
