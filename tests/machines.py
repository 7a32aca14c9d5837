"""What the real-VM tests do with machines: the image they use, a warm process in it, and how it is asked."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from coppice.host import AsyncHost
from coppice.model import MIB, Instance

IMAGE = "debian-python"
PACKAGES = ("python3", "python3-numpy")
GUEST_MEMORY = 512 * MIB

# A resident process with state of its own, which every fork finds warm: it evaluates what it is sent.
WARM_SERVER = """
import os, socketserver, numpy
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(repr(eval(self.rfile.readline(), {"numpy": numpy, "os": os})).encode() + b"\\n")
os.makedirs("/run/warm", exist_ok=True)
server = socketserver.UnixStreamServer("/run/warm/sock", Handler)
print("WARM", flush=True)
server.serve_forever()
"""
ASK = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect("/run/warm/sock")
s.sendall(sys.argv[1].encode() + b"\\n"); print(s.makefile().readline(), end="")
"""


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
    assert await ask(host, vm, "1 + 1") == "2"  # the client's code is warm too


async def ask(host: AsyncHost, vm: Instance, expression: str) -> str:
    """Evaluate an expression in the warm process of a machine."""
    result = await host.exec(vm, ["python3", "-c", ASK, expression], timeout_s=60)
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
