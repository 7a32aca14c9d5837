"""Operations of a server. Each goes on if its client's connection is lost, and can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Literal

import msgspec

from coppice.errors import CoppiceError, NotFound, Overloaded, Refused, TooManyOperations
from coppice.model import Progress, ProgressSink, Record
from coppice.names import new_id
from coppice.server.failures import Failure, failure_of

KEPT_S: Final = 3600.0
"""Seconds for which an ended operation can still be looked up."""
_MOST_KEPT: Final = 10_000
MOST_BYTES: Final = 128 << 20
"""Bytes of the results of ended operations. Beyond them, the oldest operations are forgotten."""
_ITEM: Final = 4096  # bytes that a record or an item of a list is taken for

Status = Literal["running", "succeeded", "failed", "cancelled"]
Work = Callable[[ProgressSink], Awaitable[Any]]


class Limits(Record, frozen=True, kw_only=True):
    """How many operations may run at once. Further ones are refused, to be sent again later."""

    of_owner: int = 1000
    of_all: int = 4000


class OperationView(Record, frozen=True, kw_only=True):
    """An operation as clients see it."""

    id: str
    operation: str
    status: Status
    created_at: float
    ended_at: float | None = None
    progress: Progress | None = None
    result: Any = None
    error: Failure | None = None


def without_frames(error: BaseException) -> None:
    """Let an error, and those that led to it, refer to no frames: they keep the body of the request in memory."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        each = chain.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            chain += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


class Operation:
    """One operation of one owner."""

    def __init__(self, name: str, owner: str | None, work: Work) -> None:
        self.id = new_id()
        self.name = name
        self.owner = owner
        self._created_at = time.time()
        self._ended_at: float | None = None
        self._progress: Progress | None = None
        self._forks: list[Progress] = []
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.task = asyncio.create_task(self._run(work), name=f"{name} {self.id}")

    async def _run(self, work: Work) -> Any:
        try:
            return await work(self._report)
        except (CoppiceError, asyncio.CancelledError) as error:
            without_frames(error)
            raise
        finally:
            del work
            self._ended_at = time.time()
            self._wake()

    def _report(self, progress: Progress) -> None:
        """Record a step. Any thread may call it."""
        self._progress = progress
        if progress.fork is not None:
            self._forks.append(progress)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads the progress
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Return whether it has ended."""
        return self.task.done()

    @property
    def outcome(self) -> Any:
        """Return the result of an operation that has succeeded, else None."""
        return None if self.task.cancelled() or self.task.exception() else self.task.result()

    def view(self) -> OperationView:
        """Return its present state."""
        status: Status = "running"
        result, error = None, None
        if self.task.done():
            if self.task.cancelled():
                status = "cancelled"
            elif (failed := self.task.exception()) is not None:
                status = "failed"
                error = failure_of(failed)[1] if isinstance(failed, Exception) else None
            else:
                status, result = "succeeded", self.task.result()
        return OperationView(
            id=self.id,
            operation=self.name,
            status=status,
            created_at=self._created_at,
            ended_at=self._ended_at,
            progress=self._progress and msgspec.structs.replace(self._progress, fork=None),
            result=result,
            error=error,
        )

    @property
    def weight(self) -> int:
        """About how many bytes it keeps in memory. It has ended."""
        kept = (1 + len(self._forks)) * _ITEM
        if self.task.cancelled() or self.task.exception() is not None:
            return kept
        result = self.task.result()
        fields = msgspec.structs.astuple(result) if isinstance(result, msgspec.Struct) else (result,)
        texts = sum(len(each) for each in fields if isinstance(each, bytes | str))
        return kept + texts + _ITEM * sum(len(each) for each in fields if isinstance(each, tuple | list | dict))

    async def result(self) -> Any:
        """Wait for the end and return the result. If the caller is cancelled, the operation goes on.

        :raises Refused: the operation was cancelled
        """
        await asyncio.wait({self.task})
        if self.task.cancelled():
            raise Refused(f"the operation {self.id} was cancelled", hint="send the request again")
        return self.task.result()

    async def steps(self, every_s: float) -> AsyncIterator[Progress | None]:
        """Yield its progress until its end, and None after each silence of `every_s` seconds.

        Steps that follow each other closely are merged, except the result of each fork: none is
        left out, also for a reader who comes late.
        """
        shown: Progress | None = None
        forks = 0
        while True:
            changed = self._changed
            if forks < len(self._forks):
                shown = self._forks[forks]
                forks += 1
                yield shown
            elif self._progress is not None and self._progress is not shown:
                shown = self._progress
                yield shown
            elif self.task.done():
                return
            else:
                waiting = asyncio.ensure_future(changed.wait())
                try:
                    done, _ = await asyncio.wait(
                        {self.task, waiting}, timeout=every_s, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    waiting.cancel()
                if not done:
                    yield None


class Operations:
    """The operations of a server since its start."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._operations: dict[str, Operation] = {}
        self._running: Counter[str | None] = Counter()  # by owner
        self._ended: deque[tuple[float, int, Operation]] = deque()  # with the time and the weight
        self._bytes = 0  # of those that have ended

    def start(self, name: str, owner: str | None, work: Work) -> Operation:
        """Start an operation.

        :raises TooManyOperations: the owner has too many running operations
        :raises Overloaded: all owners together have too many
        """
        self._forget()
        if (running := self._running.total()) >= self._limits.of_all:
            raise Overloaded(f"the server carries out {running} operations", hint="send the request again later")
        if self._running[owner] >= self._limits.of_owner:
            raise TooManyOperations(
                f"{self._running[owner]} operations of this owner are running",
                hint="wait until some of them have ended",
            )
        operation = Operation(name, owner, work)
        self._operations[operation.id] = operation
        self._running[owner] += 1
        operation.task.add_done_callback(lambda _: self._end(operation))
        return operation

    def _end(self, operation: Operation) -> None:
        weight = operation.weight  # later it can be another one: a thread may still report a step
        self._ended.append((time.time(), weight, operation))
        self._bytes += weight
        self._running[operation.owner] -= 1
        if not self._running[operation.owner]:
            del self._running[operation.owner]
        self._forget()

    def get(self, key: str, owner: str | None) -> Operation:
        """Return an operation of an owner. The operator sees all.

        :raises NotFound: the owner has no such operation
        """
        found = self._operations.get(key)
        if found is None or owner not in (None, found.owner):
            raise NotFound(f"there is no operation {key!r}", hint="ended operations are kept for an hour")
        return found

    def all(self, owner: str | None) -> list[Operation]:
        """Return the operations of an owner, oldest first. The operator sees all."""
        self._forget()
        return [each for each in self._operations.values() if owner in (None, each.owner)]

    async def cancel(self, operation: Operation) -> None:
        """Cancel an operation and wait for its cleanup. An ended operation stays as it is."""
        operation.task.cancel()
        await asyncio.wait({operation.task})

    async def close(self) -> None:
        """Cancel all operations and wait for their cleanup. Idempotent."""
        running = [each.task for each in self._operations.values() if not each.ended]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def _forget(self) -> None:
        """Forget operations that ended long ago, and the oldest if they are too many or their results too large."""
        old = time.time() - KEPT_S
        while self._ended and (
            len(self._operations) > _MOST_KEPT
            or (self._bytes > MOST_BYTES and len(self._ended) > 1)  # the latest can be looked up, however large
            or self._ended[0][0] < old
        ):
            _, weight, forgotten = self._ended.popleft()
            self._bytes -= weight
            del self._operations[forgotten.id]
