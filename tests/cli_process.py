"""The real command line in a process of its own, over a host whose guest is this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli_host import PROGRAM

SOURCE = Path(__file__).parents[1] / "src"
PYTHON = sys.executable


def command(*words: str) -> list[str]:
    """Return the argument list of the program."""
    return [PYTHON, str(PROGRAM), *words]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of the program."""
    return {**os.environ, "PYTHONPATH": str(SOURCE), **more}


def run(*words: str, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the program to its end."""
    return subprocess.run(
        command(*words), input=stdin, env=environment(), capture_output=True, timeout=60, check=False, **options
    )


@contextlib.contextmanager
def started(*words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start the program, and end it at the end of the block."""
    with subprocess.Popen(command(*words), env=environment(), **options) as child:
        try:
            yield child
        finally:
            child.kill()
