"""The memory of this process, for tests that it does not grow with the number of operations."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator

_BYTES_PER_ROUND = 64  # less than the smallest record, task or buffer that a round could leave
_SLACK = 8 << 10
_WINDOWS = 8  # seconds each: what is kept for some seconds, as lingering connections are, has gone by then
_FRAMES = 8


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Count the memory of this process, for a block."""
    tracemalloc.start(_FRAMES)
    try:
        yield
    finally:
        tracemalloc.stop()


def _held() -> tuple[int, tracemalloc.Snapshot]:
    gc.collect()
    ours = tracemalloc.Filter(True, "*/src/coppice/*", all_frames=True)  # and not what a fake guest holds
    taken = tracemalloc.take_snapshot().filter_traces((ours,))
    return sum(trace.size for trace in taken.traces), taken


def _growth(before: tracemalloc.Snapshot, after: tracemalloc.Snapshot) -> str:
    grown = after.compare_to(before, "traceback")[:6]
    return "\n".join(
        f"{each.size_diff} bytes in {each.count_diff}:\n" + "\n".join(each.traceback.format()) for each in grown
    )


async def assert_flat(work: Callable[[], Awaitable[object]], rounds: int, *, at_once: int = 1) -> int:
    """Assert that the memory of this package does not grow with the number of rounds. Return its growth in bytes.

    What grows with the rounds grows in each window of them. Tables of the loop double now and then, and data may be
    on its way when a window ends.

    :param at_once: operations of a round
    """
    with traced():
        for _ in range(max(rounds // 4, 2)):
            await work()
        before, first = _held()
        for _ in range(_WINDOWS):
            for _ in range(rounds):
                await work()
            after, last = _held()
            if after - before < _SLACK + rounds * at_once * _BYTES_PER_ROUND:
                return after - before
            report, before, first = _growth(first, last), after, last
    raise AssertionError(
        f"the memory grows in each of {_WINDOWS} windows of {rounds} rounds, in the last one by:\n{report}"
    )
