"""The command line: `coppice`. Thin over AsyncHost; what it adds is parsing, pictures and exit codes.

`coppice --help` must answer at once, so modules here import the host, rich and msgspec inside of the commands that need them.
"""

from __future__ import annotations

from coppice.cli.program import main

__all__ = ["main"]
