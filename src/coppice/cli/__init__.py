"""The command line: `coppice`. Thin over AsyncHost; what it adds is parsing, pictures and exit codes.

`coppice --help` must answer at once, so modules here import the host, asyncio, rich and msgspec inside of the commands that need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coppice.cli.context import HostFactory

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, *, host_factory: HostFactory | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status.

    `host_factory` makes the host from the global options; tests give a fake one.
    """
    try:
        from coppice.cli import program

        return program.run(arguments, host_factory)
    except KeyboardInterrupt:  # before there was anything to clean up
        return 130
