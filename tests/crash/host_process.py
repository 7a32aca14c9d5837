"""The host process that is killed: `python -m crash.host_process HOME OPERATION STEP`, STEP 0 for one that is killed from outside, or lives.

It says `begin` when the data directory is open, the name of the step that it dies at, and, if it lives, all steps as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from coppice.host import AsyncHost
from crash.operations import OPERATIONS
from crash.steps import Steps


def say(text: str) -> None:
    """Print past all buffers: the next thing may be death."""
    os.write(1, text.encode() + b"\n")


async def main(home: str, operation: str, step: int) -> None:
    """Open the data directory and do the operation."""
    steps = Steps(step, say)
    async with AsyncHost(Path(home)) as host:
        steps.install()
        say("begin")
        steps.arm()
        await OPERATIONS[operation].act(host)
        steps.disarm()
        say(json.dumps(steps.names))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
