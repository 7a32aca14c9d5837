"""Background hashing over real machines: what the command line has captured gets its SHA-256 after the command has ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from coppice.host import AsyncHost
from coppice.instance import digests
from coppice.model import Instance
from coppice.vmm import driver as files

DEADLINE_S = 100.0  # it has the least of the CPU, and a busy host has little to spare


def hashers(home: Path) -> list[str]:
    """The command lines of those that hash for this data directory."""
    found = subprocess.run(["pgrep", "-af", digests.__name__], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if str(home) in line.split()]


async def settled(host: AsyncHost) -> None:
    """Until nothing lacks its digest, and nobody hashes."""
    async with asyncio.timeout(DEADLINE_S):
        while hashers(host.home) or digests.any_lacking(host.rooms.layout, host.rooms.store):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.1)


async def test_a_capture_by_the_command_line_gets_its_digest(host: AsyncHost, vm: Instance) -> None:
    """The command returns at once; sha256sum agrees with what is recorded later; and no process is left."""
    await settled(host)  # what the host of this session has captured
    command = [sys.executable, "-m", "coppice", "--home", str(host.home), "standby", vm.name]
    await asyncio.to_thread(subprocess.run, command, check=True, env=os.environ | {"COPPICE_HASHING": "on"}, timeout=60)
    await settled(host)
    captured = await host.get(vm)
    memory = host.rooms.directory(vm.id) / files.MEMORY
    said = await asyncio.to_thread(subprocess.check_output, ["sha256sum", str(memory)], text=True)
    assert captured.mem_file
    assert captured.mem_file.sha256 == said.split()[0]
    assert (await host.verify()).recorded == 0
