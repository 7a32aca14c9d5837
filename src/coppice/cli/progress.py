"""A progress bar on standard error, if that is a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from coppice.cli import format

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from coppice.model import Progress, ProgressSink

_DELAY_S = 0.5
_drawing = threading.Lock()


@contextlib.contextmanager
def shown(*, wanted: bool = True) -> Iterator[ProgressSink]:
    """Draw the steps that the yielded sink receives during a block, one stage at a time. Then erase
    them.

    Nothing is drawn in the first half second: importing the drawing library takes longer than a
    fork. Of works at the same time, only one is drawn.
    """
    from coppice.model import no_progress

    if not (wanted and sys.stderr.isatty() and _drawing.acquire(blocking=False)):
        yield no_progress
        return
    picture = _Picture()
    timer = threading.Timer(_DELAY_S, picture.begin)
    timer.daemon = True
    timer.start()
    try:
        yield picture.step
    finally:
        timer.cancel()
        picture.end()
        _drawing.release()


class _Picture:
    """The progress bar, drawn after `begin`. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: Progress | None = None
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._ended = False

    def begin(self) -> None:
        """Start to draw."""
        bar = _bar()
        with self._lock:
            if self._ended:
                return
            self._bar = bar
            bar.start()
            if self._latest is not None:
                self._draw(bar, self._latest)

    def step(self, step: Progress) -> None:
        """Record a step of the work, and draw it after `begin`."""
        with self._lock:
            self._latest = step
            if self._bar is not None:
                self._draw(self._bar, step)

    def end(self) -> None:
        """Erase the bar."""
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()

    def _draw(self, bar: Bar, step: Progress) -> None:
        if self._task is None or self._stage != step.stage:
            if self._task is not None:
                bar.remove_task(self._task)
            self._stage, self._task = step.stage, bar.add_task(step.stage, total=step.total, amount="")
        bar.update(self._task, completed=step.done, total=step.total, amount=amount(step))


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Drawn
    from rich.progress_bar import ProgressBar

    class Extent(BarColumn):
        """A bar, shown only if the total is known."""

        def render(self, task: Task) -> ProgressBar:
            return super().render(task) if task.total is not None else ProgressBar(total=1, width=0)

    return Drawn(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        Extent(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def amount(step: Progress) -> str:
    """Format the progress of a step in its unit."""
    if step.unit == "bytes":
        return format.size(step.done) + (f" of {format.size(step.total)}" if step.total is not None else "")
    if step.unit == "ms" or step.total is None:
        return ""
    return f"{step.done} of {step.total}"
