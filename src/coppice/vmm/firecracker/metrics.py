"""Firecracker's metrics: JSON lines of counters, each with what was counted since the line before.

Firecracker writes a line each minute, and one when it ends by itself. Its log says that it ended;
the counters show why: a refused system call, a fault on its memory, a vCPU that KVM cannot run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

METRICS: Final = "metrics.log"  # in the directory of the logs, and no part of the machine
_TAIL: Final = 64 << 10  # several lines
_FATAL: Final = {
    ("seccomp", "num_faults"): "system calls that its filter refused",
    ("signals", "sigbus"): "SIGBUS: its memory file or disk could not be read",
    ("signals", "sigsegv"): "SIGSEGV",
    ("signals", "sigill"): "SIGILL",
    ("signals", "sigxfsz"): "SIGXFSZ: a file reached its limit",
    ("vmm", "panic_count"): "panics",
    ("vcpu", "failures"): "failures of a vCPU",
}


def fatal(path: Path) -> str:
    """Return the counters in the last line that can end a VMM; "" if there are none. Blocks."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _TAIL))
            lines = stream.read().splitlines()
        counters = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return ""
    found = [
        f"{meaning} ({count})"
        for (group, name), meaning in _FATAL.items()
        if isinstance(counters, dict)
        and isinstance(of_group := counters.get(group), dict)
        and isinstance(count := of_group.get(name), int)
        and count > 0
    ]
    return ", ".join(found)
