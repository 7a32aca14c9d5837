"""Background hashing of real machines: a capture by the command line gets its SHA-256 after the
command has ended.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from coppice.client import AsyncHost
from coppice.integrity import digests
from coppice.model import Instance
from coppice.requests import GetRequest
from coppice.vmm import driver as files

DEADLINE_S = 100.0  # hashing has the lowest priority, and the host may be busy


def hashers(home: Path) -> list[str]:
    """Return the command lines of the processes that hash for this data directory."""
    found = subprocess.run(["pgrep", "-af", digests.__name__], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if str(home) in line.split()]


async def settled(host: AsyncHost) -> None:
    """Wait until nothing lacks its digest and no process hashes."""
    async with asyncio.timeout(DEADLINE_S):
        while hashers(host.home) or digests.any_lacking(host.local.rooms.layout, host.local.rooms.store):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.1)


async def test_a_capture_by_the_command_line_gets_its_digest(host: AsyncHost, vm: Instance) -> None:
    """The command returns at once, the later digest is right, and no process is left."""
    await settled(host)  # the captures of this session's host
    command = [sys.executable, "-m", "coppice", "--home", str(host.home), "standby", vm.name]
    await asyncio.to_thread(subprocess.run, command, check=True, env=os.environ | {"COPPICE_HASHING": "on"}, timeout=60)
    await settled(host)
    captured = await host.call(GetRequest(instance=vm.id))
    memory = host.local.rooms.directory(vm.id) / files.MEMORY
    said = await asyncio.to_thread(subprocess.check_output, ["sha256sum", str(memory)], text=True)
    assert captured.mem_file
    assert captured.mem_file.sha256 == said.split()[0]
    assert (await host.verify()).recorded == 0
