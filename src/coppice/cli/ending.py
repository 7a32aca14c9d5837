"""Ways for the program to end that are no errors."""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """A signal ended the work, after its cleanup."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class OutputClosed(Exception):
    """Whoever read our standard output has gone: `coppice ls | head -1` does it."""
