"""The progress of a long operation, and the callback that receives it."""

from collections.abc import Callable
from typing import Literal

from coppice.model.record import MIB, Record
from coppice.model.reports import ForkResult


class Progress(Record, frozen=True, kw_only=True):
    """One step of a long operation, counted in `unit`. `total` is None if it is unknown.

    A fan-out reports each fork as soon as it is ready or has failed: `fork` is its result. If the
    fan-out is atomic, a later failure undoes the fork.
    """

    stage: str
    done: int = 0
    total: int | None = None
    unit: Literal["bytes", "items", "ms"] = "items"
    fork: ForkResult | None = None


ProgressSink = Callable[[Progress], None]
"""Called from the thread or task that does the work. It must be quick and must not raise."""


def no_progress(_: Progress) -> None:
    """Ignore progress."""


class Meter:
    """Reports the bytes copied to a sink, once per MiB."""

    def __init__(self, sink: ProgressSink, total: int | None, stage: str = "copy") -> None:
        self._sink = sink
        self._total = total
        self._stage = stage
        self._done = self._told = 0
        self._tell()

    def moved(self, size: int) -> None:
        """Count more bytes."""
        self._done += size
        if self._done - self._told >= MIB or self._told < self._done == self._total:
            self._tell()

    def _tell(self) -> None:
        self._told = self._done
        self._sink(Progress(stage=self._stage, done=self._done, total=self._total, unit="bytes"))
