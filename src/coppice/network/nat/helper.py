"""Processes of the provider that outlive the command that starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


def start_helper(module: str, arguments: Sequence[str], inherited: Sequence[int], log: Path) -> None:
    """Run a module in a new session, with descriptors of this process as its last arguments. Blocks.

    :param log: gets its output, after what is there
    :raises OSError: the process cannot be started
    """
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments, *map(str, inherited)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=tuple(inherited),
        )
    # It may outlive this process; if not, this thread reaps it.
    threading.Thread(target=child.wait, name=module, daemon=True).start()
