"""Exceptions that end the program but are not errors."""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """A signal ended the work, after its cleanup."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number

    def fields(self) -> dict[str, str | None]:
        """Return the fields of the JSON output."""
        return {"code": "interrupted", "message": f"ended by {self}", "hint": None}


class Left(Interrupted):
    """The user left a session with `~.`."""

    def __init__(self) -> None:
        super().__init__(signal.SIGHUP)


class OutputClosed(Exception):
    """The reader of standard output has closed it, as in `coppice ls | head -1`."""
