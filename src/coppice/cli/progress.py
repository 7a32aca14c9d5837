"""A progress bar on standard error, where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from coppice.cli import format

if TYPE_CHECKING:
    from rich.progress import TaskID

    from coppice.model import Progress, ProgressSink


@contextlib.contextmanager
def shown(*, wanted: bool = True) -> Iterator[ProgressSink]:
    """A sink whose steps are drawn while the block runs, one stage at a time; nothing of it stays on the screen."""
    from coppice.model import no_progress

    if not (wanted and sys.stderr.isatty()):
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.progress_bar import ProgressBar

    class Extent(BarColumn):
        """A bar, where the end is known; otherwise the spinner says enough."""

        def render(self, task: Task) -> ProgressBar:
            return super().render(task) if task.total is not None else ProgressBar(total=1, width=0)

    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        Extent(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    lock = threading.Lock()
    current: tuple[str, TaskID] | None = None

    def sink(step: Progress) -> None:
        nonlocal current
        with lock:
            if current is None or current[0] != step.stage:
                if current is not None:
                    bar.remove_task(current[1])
                current = step.stage, bar.add_task(step.stage, total=step.total, amount="")
            bar.update(current[1], completed=step.done, total=step.total, amount=amount(step))

    with bar:
        yield sink


def amount(step: Progress) -> str:
    """How far a step is, in its unit."""
    if step.unit == "bytes":
        return format.size(step.done) + (f" of {format.size(step.total)}" if step.total is not None else "")
    if step.unit == "ms" or step.total is None:
        return ""
    return f"{step.done} of {step.total}"
