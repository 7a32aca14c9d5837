"""The progress of a long operation, and the callback that receives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from coppice.model.record import Record
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
