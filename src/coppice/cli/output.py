"""Printing of documents, tables and errors. Results go to standard output, the rest to standard
error.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterable, Sequence

from coppice.cli import table as tables
from coppice.cli.ending import OutputClosed
from coppice.cli.table import Column
from coppice.errors import CoppiceError

Field = tuple[str, str | None]

# Sequences that could move the cursor or set the terminal's title. Colours (SGR) are allowed.
_UNSAFE = rb"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f]"
_UNSAFE_TEXT = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
_WIDE = 1 << 14  # the width without a terminal: lines are never folded


class OutputLost(CoppiceError):
    """Standard output cannot be written: its disk is full, or its terminal is closed."""


def open_streams() -> None:
    """Open closed standard streams on /dev/null.

    Otherwise the next opened file or socket would get the number of a closed stream, and receive
    the output.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


def write(data: bytes) -> None:
    """Write to standard output, and flush it.

    :raises OutputClosed: the reader has closed it
    :raises OutputLost: it cannot be written
    """
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        discard()
        raise unwritten(error) from error


def unwritten(error: OSError) -> Exception:
    """Return the exception to raise if writing to standard output has failed."""
    if isinstance(error, BrokenPipeError):
        return OutputClosed()
    return OutputLost(
        f"cannot write to standard output: {error.strerror or error}",
        hint="the operation is done; `coppice ls` and `coppice inspect NAME` show its result",
    )


def discard() -> None:
    """Redirect standard output to /dev/null, so that the flush at exit causes no error."""
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
    """Print a line to standard error, if possible. Escape control characters, which may come from a
    guest.
    """
    with contextlib.suppress(OSError):
        print(f"coppice: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201 - this is the one place that does


def warn_of_shared_random(source: str, processes: Sequence[str]) -> None:
    """Print which processes continue with the same random numbers in all forks, if there are any."""
    if processes:
        complain(f"all forks of {source} continue with the same random numbers in {'; '.join(processes)}")
        complain("hint: see docs/fork-correctness.md, section Random numbers, for what to do about each")


def printable(text: str) -> str:
    """Return the text with escaped control characters."""
    return re.sub(_UNSAFE_TEXT, lambda found: f"\\x{ord(found[0]):02x}", text)


def harmless(data: bytes) -> bytes:
    """Return bytes from a guest with escaped control characters, except colours."""
    return re.sub(_UNSAFE, lambda found: "".join(f"\\x{byte:02x}" for byte in found[0]).encode(), data)


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, optional: Collection[str] = ()) -> None:
    """Print rows in aligned columns, below their headings.

    An `optional` column is printed only if a row has a value other than `-` in it.
    """
    rows = list(rows)
    shown = [
        place
        for place, (heading, _) in enumerate(columns)
        if heading not in optional or any(row[place] not in ("-", "") for row in rows)
    ]
    _print([columns[place] for place in shown], [[row[place] for place in shown] for row in rows])


def width() -> int:
    """Return the width available to a table, which is unlimited if the output is not a terminal."""
    return tables.columns_of_terminal() or _WIDE


def fields(pairs: Iterable[Field]) -> None:
    """Print labels and their values in two columns. Leave out empty values."""
    rows = [(tables.Styled(label, tables.BOLD), value) for label, value in pairs if value]
    _print([("", "left"), ("", "left")], rows)


def _print(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    lines = tables.lines(columns, rows, tables.columns_of_terminal())
    write("".join(f"{text}\n" for text in lines).encode(errors="replace"))


def error_fields(error: CoppiceError) -> dict[str, str | None]:
    """Return the fields of an error for JSON.

    They are valid UTF-8, even if a file's name is not.
    """
    from coppice.names import as_recorded

    message, hint = (text and as_recorded(text) for text in (error.message, error.hint))
    return {"code": error.code, "message": message, "hint": hint}
