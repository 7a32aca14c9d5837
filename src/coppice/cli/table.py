"""Aligned columns, and the colours of states.

Importing a library for tables would take longer than `coppice ls`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Literal

Column = tuple[str, Literal["left", "right"]]

_GAP = "  "
_NARROW = 12  # the smallest width to which a column is reduced
_STATES = {"Running": "32", "Template": "35", "Standby": "36", "Stopped": "2", "Unknown": "31"}
_STATUSES = {"ok": "32", "warn": "33", "fail": "1;31"}
BOLD = "1"
BAD = "31"
_OTHER = "33"


class Styled(str):
    """Text with a style for terminals (the parameters of SGR)."""

    __slots__ = ("style",)

    def __new__(cls, text: str, style: str) -> Styled:
        """Make a styled text of a plain one."""
        made = super().__new__(cls, text)
        made.style = style
        return made

    style: str


@functools.cache
def state(text: str) -> Styled:
    """Return a state in its colour."""
    return Styled(text, _STATES.get(text, _OTHER))  # also `Running (exited 1)`, which is worth a look


def status(text: str) -> Styled:
    """Return the outcome of a check in its colour."""
    return Styled(text, _STATUSES.get(text, _OTHER))


def lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], available: int | None) -> Iterator[str]:
    """Yield the lines of a table.

    Cells are folded if the table is wider than `available`, the width of the terminal. None: the
    output is not a terminal.
    """
    styled = available is not None and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    table = (
        [[Styled(heading, BOLD) for heading, _ in columns], *rows] if any(heading for heading, _ in columns) else rows
    )
    widths = [max((len(row[place]) for row in table), default=0) for place in range(len(columns))]
    if available is None:
        pattern = _GAP.join(
            f"{{:{'>' if side == 'right' else '<'}{width or ''}}}"
            for (_, side), width in zip(columns, widths, strict=True)
        )
        for row in table:
            yield pattern.format(*row).rstrip()
        return
    _narrow(widths, available)
    for row in table:
        for line in zip_longest(*map(_folded, row, widths), fillvalue=""):
            cells = map(_cell, line, row, widths, (side for _, side in columns), [styled] * len(columns))
            yield _GAP.join(cells).rstrip()


def _narrow(widths: list[int], available: int) -> None:
    """Reduce the widest columns until the table fits."""
    while sum(widths) + len(_GAP) * (len(widths) - 1) > available and max(widths) > _NARROW:
        widths[widths.index(max(widths))] -= 1


def _folded(text: str, width: int) -> Iterable[str]:
    if len(text) <= width:
        return (text,)
    from textwrap import wrap

    return wrap(text, width, break_on_hyphens=False)


def _cell(text: str, whole: str, width: int, side: str, styled: bool) -> str:
    shown = text.rjust(width) if side == "right" else text.ljust(width)
    return (
        f"\x1b[{whole.style}m{text}\x1b[0m{' ' * (width - len(text))}"
        if styled and isinstance(whole, Styled)
        else shown
    )


def columns_of_terminal() -> int | None:
    """Return the width of standard output, or None if it is not a terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80
