"""`coppice serve` over real machines whose slots are in the namespace of this process.

`python -m network.serve_process HOME LISTEN RUNTIME`: RUNTIME has the pools and a resolv.conf.
"""

from __future__ import annotations

import sys
from pathlib import Path

from servers import serve_command
from slots import rooms_with_slots


def main(home: str, listen: str, runtime: str) -> int:
    """Serve until a signal."""
    return serve_command(home, listen, open_rooms=rooms_with_slots(Path(home), None, Path(runtime)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
