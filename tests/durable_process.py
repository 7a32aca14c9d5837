"""A host process that does one operation: `python durable_process.py HOME VMM OPERATION`, with
fakes/fsync_log.c preloaded.

It prints `ready` when all is prepared, waits for a line, does the operation and copies the database
at once, as a power cut would leave it. Then it prints the outcome and is killed, without any
cleanup.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from coppice.client import AsyncHost
from coppice.errors import CoppiceError, HostCannot
from coppice.model import ForkReport, State
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    GetRequest,
    PromoteRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import boot, make
from fakes.rooms import DEADLINES, open_rooms

PREPARED: dict[str, State | None] = {
    "standby": State.RUNNING,
    "promote": State.STANDBY,
    "demote": State.TEMPLATE,
    "snapshot of a running machine": State.RUNNING,
    "snapshot": State.STANDBY,
    "snapshot restore": State.STANDBY,
    "fork to standby": State.TEMPLATE,
    "forks to stopped, all or none": State.TEMPLATE,
    "volume": None,
}
ACTIONS: dict[str, Callable[[AsyncHost], Awaitable[object]]] = {
    "standby": lambda host: host.call(StandbyRequest(instance="oak")),
    "promote": lambda host: host.call(PromoteRequest(instance="oak")),
    "demote": lambda host: host.call(DemoteRequest(instance="oak")),
    "snapshot of a running machine": lambda host: host.call(SnapshotRequest(instance="oak", name="moment")),
    "snapshot": lambda host: host.call(SnapshotRequest(instance="oak", name="moment")),
    "snapshot restore": lambda host: host.call(SnapshotRestoreRequest(snapshot="kept")),
    "fork to standby": lambda host: host.call(ForkRequest(instance="oak", names=["ash"], target=State.STANDBY)),
    "forks to stopped, all or none": lambda host: host.call(
        ForkRequest(instance="oak", count=2, target=State.STOPPED, atomic=True)
    ),
    "volume": lambda host: host.volumes.create("data", size_bytes=16 << 20),
}


def say(text: str) -> None:
    """Print without buffering."""
    os.write(1, text.encode() + b"\n")


async def main(home: Path, vmm: Path, operation: str) -> None:
    """Prepare, wait, act, copy the database."""
    async with AsyncHost(
        home, driver=FakeDriver(vmm), deadlines=DEADLINES, open_rooms=open_rooms, spares=0, background="off"
    ) as host:
        state = PREPARED[operation]
        if state is not None:
            await (boot(host) if state is State.RUNNING else make(host, state))
        if operation == "snapshot restore":
            await host.call(SnapshotRequest(instance="oak", name="kept"))
        say("ready")
        sys.stdin.readline()
        Path(os.environ["FSYNC_LOG"]).write_text("")
        try:
            made = await ACTIONS[operation](host)
            if isinstance(made, ForkReport) and made.succeeded < made.count:
                raise HostCannot(made.results[0].error or "")
        except CoppiceError as error:
            say(f"failed {type(error).__name__} {(await host.call(GetRequest(instance='oak'))).state if state else ''}")
        else:
            copy = home.parent / "copy"
            copy.mkdir()
            for name in ("coppice.db", "coppice.db-wal"):
                shutil.copy(home / name, copy / name)
            say("done")
        sys.stdin.readline()
        os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
