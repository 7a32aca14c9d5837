"""`coppice serve` in a process of its own, over fake machines whose guests outlive it.

`python -m api.serve_process HOME LISTEN HOLD PROGRAM CHANNEL`: the HOLDth restored fork waits
forever; 0: none does. The last two arguments are those of `FakeKind`. With the variable of `SILENT`
the server carries out requests, and answers none that starts a command.
"""

from __future__ import annotations

import asyncio
import os
import sys

from coppice.server import once, streams
from crash.fake_kind import FakeKind
from servers import SILENT, serve_command


async def _forever(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


def main(home: str, listen: str, hold: str, *arguments: str) -> int:
    """Serve until a signal."""
    kind = FakeKind.of_host(*arguments, driver_name="qemu")
    if int(hold):
        kind.driver.faults.hold_at("restored", nth=int(hold))
    if SILENT in os.environ:
        streams.send = _forever
        once.Once._record = _forever  # type: ignore[method-assign]
    return serve_command(home, listen, **kind.options)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
