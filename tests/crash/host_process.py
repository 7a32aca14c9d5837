"""The process that forks hosts: `python -m crash.host_process HOME [ARGUMENT...]`. The arguments
come from `Kind.arguments`.

For each line `OPERATION STEP` on stdin it forks a host, which has all modules imported. The host
kills itself at that step, a number or the beginning of a name; with STEP 0 it does not. The lines on stdout are, in this order: the
host's pid; `begin` when the data directory is open; the name of the step at which it kills itself,
or its `Measured` record as JSON when the operation has ended; and `ended STATUS`. The host is
reaped at the next line on stdin, so until then no other process has its pid.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from crash.fake_kind import FakeKind
from crash.kinds import Kind, RealKind
from crash.operations import OPERATIONS
from crash.steps import Measured, Steps


def say(text: str) -> None:
    """Print without a buffer, because the process may be killed next."""
    os.write(1, text.encode() + b"\n")


async def work(home: str, kind: Kind, operation: str, step: int | str) -> None:
    """Open the data directory and do the operation."""
    steps = Steps(step, say)
    async with kind.host(Path(home)) as host:
        steps.install()
        say("begin")
        begin = time.monotonic()
        steps.arm()
        await OPERATIONS[operation].act(host, kind)
        steps.disarm()
        wall_s = time.monotonic() - begin
        say(msgspec.json.encode(Measured(steps=steps.names, wall_s=wall_s)).decode())


def forking(work_of: Callable[[str], int]) -> int:
    """Fork a process for each line on stdin, which does its work and exits with the returned status."""
    ended: list[int] = []
    while line := sys.stdin.readline():
        for pid in ended:
            os.waitpid(pid, 0)
        if (pid := os.fork()) == 0:
            say(f"{os.getpid()}")
            return work_of(line)
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert found is not None
        say(f"ended {found.si_status if found.si_code == os.CLD_EXITED else -found.si_status}")
        ended = [pid]
    return 0


def main(home: str, *arguments: str) -> int:
    """Fork a host for each line, until stdin ends."""
    kind = FakeKind.of_host(*arguments) if arguments else RealKind()
    kind.host(Path(home))  # imports all modules that a host needs

    def work_of(line: str) -> int:
        operation, step = line.rstrip("\n").split(maxsplit=1)
        asyncio.run(work(home, kind, operation, int(step) if step.isdigit() else step))
        return 0

    return forking(work_of)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
