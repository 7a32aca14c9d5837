"""What is printed: documents, tables and errors. Standard output is for results alone; everything else goes to standard error."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from coppice.cli.ending import OutputClosed
from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

Column = tuple[str, Literal["left", "right"]]
Field = tuple[str, "str | Text | None"]

_STATE_STYLES = {
    "Running": "green",
    "Template": "magenta",
    "Standby": "cyan",
    "Stopped": "dim",
    "Unknown": "red",
}
# Everything that could move the cursor or set the terminal's title; colours (SGR) are let through.
_UNSAFE = re.compile(rb"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f]")
_UNSAFE_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WIDE = 1 << 14  # where the output is no terminal, lines are as long as they need to be


class OutputLost(CoppiceError):
    """Standard output does not take what is written to it: its disk is full, or its terminal is gone."""


def open_streams() -> None:
    """Open those of the three standard streams that are closed, on nothing.

    The next file or socket that is opened would get the number of a closed one, and what is printed would go there.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


def write(data: bytes) -> None:
    """Write to standard output, at once.

    :raises OutputClosed: nobody reads it any more
    :raises OutputLost: it cannot be written
    """
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        discard()
        raise unwritten(error) from error


def unwritten(error: OSError) -> Exception:
    """What to raise where standard output was not written."""
    if isinstance(error, BrokenPipeError):
        return OutputClosed()
    return OutputLost(
        f"standard output cannot be written: {error.strerror or error}",
        hint="what was to be done is done; ask for the result again, to another place",
    )


def discard() -> None:
    """Send what is still buffered for standard output nowhere, so that the interpreter does not complain at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)


def line(text: str) -> None:
    """Print a line of text."""
    write(text.encode(errors="replace") + b"\n")


def document(value: object) -> None:
    """Print a value as one JSON document."""
    from coppice.model import to_json

    write(to_json(value) + b"\n")


def complain(text: str) -> None:
    """Print a line to standard error, where it can be. Control characters, which may come from a guest, are made visible."""
    with contextlib.suppress(OSError):
        print(f"coppice: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201 - this is the one place that does


def printable(text: str) -> str:
    """The text without what a terminal would obey."""
    return _UNSAFE_TEXT.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def harmless(data: bytes) -> bytes:
    """Bytes of a guest, made safe for a terminal: control characters are made visible, colours stay."""
    return _UNSAFE.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0]).encode(), data)


def table(columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], *, optional: Collection[str] = ()) -> None:
    """Print rows under their headings, in aligned columns; `optional` ones only where a row has more than `-`. Without rows: the headings alone."""
    from rich.table import Table

    rows = list(rows)
    shown = [
        place
        for place, (heading, _) in enumerate(columns)
        if heading not in optional or any(str(row[place]) != "-" for row in rows)
    ]
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, justify in (columns[place] for place in shown):
        grid.add_column(heading, justify=justify, overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in rows:
        grid.add_row(*(row[place] for place in shown))
    render(grid)


def width() -> int:
    """Columns that a table may have: as many as it needs, where the output is no terminal."""
    return _console().width


def fields(pairs: Iterable[Field]) -> None:
    """Print labels with their values, in two columns; what has no value is left out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in pairs:
        if value:
            grid.add_row(label, value)
    render(grid)


def render(what: RenderableType) -> None:
    """Print something of rich's, without trailing blanks."""
    console = _console()
    with console.capture() as captured:
        console.print(what)
    lines = (text.rstrip() for text in captured.get().splitlines())
    write("".join(f"{text}\n" for text in lines).encode(errors="replace"))


def _console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def state(text: str) -> Text:
    """A state in its colour."""
    from rich.text import Text

    return Text(text, style=_STATE_STYLES.get(text, "yellow"))


def error_fields(error: CoppiceError) -> dict[str, str | None]:
    """An error as the JSON output has it: in UTF-8, also where it names a file that is not."""
    from coppice.names import as_recorded

    message, hint = (text and as_recorded(text) for text in (error.message, error.hint))
    return {"code": error.code, "message": message, "hint": hint}
