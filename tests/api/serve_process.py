"""`coppice serve` in a process of its own, over fake machines whose guests outlive it.

`python -m api.serve_process HOME LISTEN HOLD PROGRAM CHANNEL`: the HOLDth restored fork waits
forever; 0: none does. The last two arguments are those of `FakeKind`.
"""

from __future__ import annotations

import sys

from crash.fake_kind import FakeKind
from servers import serve_command


def main(home: str, listen: str, hold: str, *arguments: str) -> int:
    """Serve until a signal."""
    kind = FakeKind.of_host(*arguments, driver_name="qemu")
    if int(hold):
        kind.driver.faults.hold_at("restored", nth=int(hold))
    return serve_command(home, listen, **kind.options)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
