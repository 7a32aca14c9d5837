"""The process that forks servers: `python -m crash.server_process HOME SOCKET [ARGUMENT...]`. The
last arguments come from `Kind.arguments`.

For each line `STEP` on stdin it forks a `coppice serve`, which has all modules imported. The server
kills itself at that step of the operations that it carries out; with STEP 0 it does not. The lines
on stdout are, in this order: the server's pid; `recovered: ...` for each operation of a killed server;
`listening on ...`; after each operation all steps and seconds so far, a `Measured` record as JSON;
the name of the step at which the server kills itself; and `ended STATUS`.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

from coppice.client.remote import backend, calls, commands
from coppice.requests import Request
from coppice.server import app, serving
from coppice.server.auth import Caller
from coppice.server.context import Server
from coppice.server.running import Operation
from crash.fake_kind import FakeKind
from crash.host_process import forking, say
from crash.kinds import Kind, RealKind
from crash.steps import Measured, Steps
from servers import serve_command

IMPORTED = (app, serving, backend, calls, commands)
"""What a server imports late. The forked processes have it already."""


class _Recoveries(logging.Handler):
    """Prints what the server recovers when it starts."""

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("recovered: "):
            say(text)


def work(home: str, socket: str, kind: Kind, step: int) -> int:
    """Serve until a signal, or until the step. Return the exit status of the command."""
    steps = Steps(step, say)
    begin_operation = Server.begin
    began_at: float | None = None

    async def begin(server: Server, caller: Caller, request: Request[Any]) -> Operation:
        nonlocal began_at
        began_at = began_at or time.monotonic()
        steps.arm()
        operation = await begin_operation(server, caller, request)
        operation.task.add_done_callback(lambda _: measured())
        return operation

    def measured() -> None:
        assert began_at is not None
        steps.disarm()
        say(msgspec.json.encode(Measured(steps=steps.names, wall_s=time.monotonic() - began_at)).decode())

    Server.begin = begin  # type: ignore[method-assign,assignment]
    logging.getLogger("coppice.host.recovery").addHandler(_Recoveries())
    steps.install()
    return serve_command(home, f"unix:{socket}", **kind.options)


def main(home: str, socket: str, *arguments: str) -> int:
    """Fork a server for each line, until stdin ends."""
    kind = FakeKind.of_host(*arguments) if arguments else RealKind()
    return forking(lambda line: work(home, socket, kind, int(line)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
