"""`python -m bench`, from a checkout of Coppice."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.cli import app
from coppice.cli import output
from coppice.cli.ending import Interrupted
from coppice.errors import CoppiceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    try:
        app(arguments, prog_name="python -m bench")
    except SystemExit as ended:  # typer ends every command line this way
        return ended.code if isinstance(ended.code, int) else 0
    except Interrupted as ended:
        return ended.exit_code
    except CoppiceError as error:
        output.complain("; ".join(part for part in (error.message, error.hint) if part))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
