"""The command line: `coppice`. A thin layer over a backend that adds parsing, printing and exit
codes.

`coppice --help` must answer at once. Modules here therefore import the host, asyncio, rich and
msgspec only inside the commands that need them. This one and `coppice` itself import nothing that
Python has not imported at its start: Ctrl-C during these imports cannot be caught.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from coppice.cli.context import HostFactory

__all__ = ["entry", "main"]


def main(arguments: Sequence[str] | None = None, *, host_factory: HostFactory | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status.

    `host_factory` makes the host from the global options; tests give a fake one.
    """
    from coppice.cli.start import defer_imports, without_collection

    defer_imports()
    with without_collection():
        from coppice.cli import program

        return program.run(arguments, host_factory)


def entry() -> NoReturn:
    """Run the process's own command line, and end the process with its status.

    `os._exit` skips the teardown of the interpreter, which takes a tenth of the CPU time of
    `coppice ls`.
    """
    try:
        status = main()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
    except KeyboardInterrupt:  # before the operation began, or after its end: there is nothing to clean up
        status = 130
    os._exit(status)
