"""Processes of the provider that outlive the command that starts them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path


def take(lock: int) -> bool:
    """Lock an open file for this process and those that inherit the descriptor; return False if another
    one has it. Does not block.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def start_helper(module: str, arguments: Sequence[str], inherited: Sequence[int], log: Path) -> None:
    """Run a module in a new session, with descriptors of this process as its last arguments. Blocks.

    :param log: the file that its output is appended to
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
