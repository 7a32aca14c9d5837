"""Why a machine ended by itself, in the words of its guest's kernel.

A VMM whose guest powered off, restarted or panicked ends alike, with status 0, and a host process that did not start it does not even learn the status. What
the kernel wrote last on the console tells them apart. The console is the guest's to write: these are words for people, and nothing is decided by them.
"""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 32 << 10  # a panic with its registers and call trace
_LONGEST = 120
_KERNEL_LINE = re.compile(r"\[ *(\d+\.\d+)\] (.*)")
_ENDS = (
    (re.compile(r"Kernel panic - not syncing: (.*)"), "the guest's kernel panicked: "),
    (re.compile(r"reboot: Power down()"), "the guest powered off"),
    (re.compile(r"(?:reboot: Restarting system|sysrq: Resetting)()"), "the guest restarted, which ends a machine"),
)


def of_guest(console: Path, since: float) -> str | None:
    """What the kernel said of its end, if that is the last thing on the console, and was written after `since` (seconds since the epoch). Blocks."""
    try:
        with console.open("rb") as log:
            status = console.stat()
            if status.st_mtime < since:
                return None  # of an earlier life
            log.seek(max(0, status.st_size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    later = float("inf")
    for line in reversed(lines):
        match = _KERNEL_LINE.match(line)
        # Backwards through the last lines of one kernel: another life before it would have a later time.
        if match is None or (at := float(match[1])) > later:
            return None
        later = at
        for pattern, meaning in _ENDS:
            if end := pattern.match(match[2]):
                return meaning + "".join(filter(str.isprintable, end[1]))[:_LONGEST]
    return None
