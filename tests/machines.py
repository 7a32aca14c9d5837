"""What the real-VM tests do with machines: the image they use, a warm process in it, and how it is asked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

from coppice.host import AsyncHost
from coppice.model import MIB, Instance

IMAGE = "debian-python"
PACKAGES = ("python3", "python3-numpy")
GUEST_MEMORY = 512 * MIB

# A resident process with state of its own, which every fork finds warm: it evaluates what it is sent. Through named pipes, so that a shell can ask it:
# a client in Python would take longer to start, in an emulated guest, than all else.
WARM_SERVER = """
import os, numpy
os.makedirs("/run/warm")
for name in ("ask", "answer"): os.mkfifo(f"/run/warm/{name}")
print("WARM", flush=True)
while True:
    with open("/run/warm/ask") as ask: expression = ask.readline()
    answer = repr(eval(expression, {"numpy": numpy, "os": os}))
    with open("/run/warm/answer", "w") as stream: stream.write(answer + "\\n")
"""
ASK = 'printf "%s\\n" "$1" >/run/warm/ask; IFS= read -r answer </run/warm/answer; printf "%s\\n" "$answer"'
CACHES = ("images", "kernels", "initramfs", "overlays")


def link_caches(source: Path, home: Path) -> None:
    """Have the caches of one data directory in another one on its file system: their files never change, so links do."""
    for cache in CACHES:
        shutil.rmtree(home / cache, ignore_errors=True)
        shutil.copytree(source / cache, home / cache, copy_function=os.link)


async def remove_all(host: AsyncHost) -> None:
    """Remove every instance, children first: a template with forks cannot be removed."""
    for instance in reversed(await host.ls()):
        await host.rm(instance)


async def warm_up(host: AsyncHost, vm: Instance) -> None:
    """Wait until the resident server of the machine has numpy loaded and listens."""
    async with asyncio.timeout(120):
        async for line in host.logs(vm, follow=True):
            if b"WARM" in line:
                break
    assert await ask(host, vm, "1 + 1") == "2"  # what asks is warm too


async def ask(host: AsyncHost, vm: Instance, expression: str) -> str:
    """Evaluate an expression in the warm process of a machine; one question at a time."""
    result = await host.exec(vm, ["sh", "-c", ASK, "ask", expression], timeout_s=60)
    assert result.exit_code == 0, result.stderr
    return result.stdout.decode().strip()


def mem_file(host: AsyncHost, instance: Instance) -> Path:
    """Where an instance's mem-file is."""
    return host.rooms.directory(instance.id) / "memory"


async def digest(path: Path) -> str:
    """SHA-256 of a file."""

    def read() -> str:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return await asyncio.to_thread(read)
