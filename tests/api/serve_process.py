"""A server in a process of its own, over fake machines whose guests outlive it.

`python -m api.serve_process HOME SOCKET HOLD PROGRAM CHANNEL`: the HOLDth restored fork waits
forever; 0: none does. The last two arguments are those of `FakeKind`. It prints the address when it
listens.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from coppice.server.app import make_app
from coppice.server.serving import Listening, serve
from crash.fake_kind import FakeKind
from crash.host_process import say
from servers import fake_hosts


def main(home: str, socket: str, hold: str, *kind: str) -> None:
    """Serve until a signal."""
    driver = FakeKind.of_host(*kind, driver_name="qemu").driver
    if int(hold):
        driver.faults.hold_at("restored", nth=int(hold))

    ending = asyncio.Event()
    app = make_app(fake_hosts(Path(home), driver), None, ending=ending)
    asyncio.run(serve(app, Listening(socket=Path(socket)), ready=say, ending=ending))


if __name__ == "__main__":
    main(*sys.argv[1:])
