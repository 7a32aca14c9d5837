"""Stage timings of one operation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stages:
    """The duration of each stage of one operation, in milliseconds, in the order of their
    starts.
    """

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as `name`; repeated names add up."""
        begin = time.perf_counter()
        self.ms.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.ms[name] += (time.perf_counter() - begin) * 1000

    @property
    def total_ms(self) -> float:
        """Return the wall time since the start."""
        return (time.perf_counter() - self._start) * 1000
