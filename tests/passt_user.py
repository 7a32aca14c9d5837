"""What a user who is not root does with `passt`: one machine, two forks of it, one of them restored.

passt_user.py HOME IMAGE MEMORY HOST6 WORLD4 WORLD6 PORT; prints what was seen, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from coppice.client import AsyncHost, AsyncMachine
from coppice.model import Publish

_PR_SET_CHILD_SUBREAPER = 36
# The client speaks first: the passt of Debian 12 acknowledges a connection only then.
SERVE = """
import socket
server = socket.create_server(("::", 8000), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    connection, peer = server.accept()
    connection.recv(1)
    connection.sendall(socket.gethostname().encode())
    connection.close()
"""
REACH = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as s: print(s.recv(100).decode())
except OSError as error: print(type(error).__name__)
"""
LISTENS = (
    "import socket; s = socket.create_connection(('127.0.0.1', 8000), 10); s.send(b'?'); print(s.recv(9).decode())"
)
RESOLVE = "import socket; print(socket.gethostbyname('in.example'))"
MTU = "import glob; print(*(open(each).read().strip() for each in glob.glob('/sys/class/net/e*/mtu')))"


def adopt() -> None:
    """Become the parent of every process that a process started by this one leaves."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def passts() -> int:
    """How many passt processes are children of this process: those of its own machines."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
            state, parent, *_ = rest.split()
            found += name.startswith("passt") and state != "Z" and int(parent) == os.getpid()
    return found


async def ended(left: int) -> None:
    """Wait until so many are left."""
    async with asyncio.timeout(20):
        while passts() != left:  # noqa: ASYNC110 - processes of nobody here
            await asyncio.sleep(0.05)


async def heard(machine: AsyncMachine) -> list[str]:
    """What a machine says at each of its published ports."""
    said = []
    for port in machine.record.publish:
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(port.host_address, port.host_port)
            writer.write(b"?")
            said.append((await reader.read()).decode())
            writer.close()
    return said


async def python(machine: AsyncMachine, code: str, *words: str) -> str:
    """Run Python in a guest; return what it printed."""
    result = await machine.exec(["python3", "-c", code, *words], timeout_s=120)
    return (result.stdout or result.stderr).decode().strip()


async def main(home: str, image: str, memory: str, host6: str, world4: str, world6: str, port: str) -> None:
    """Do it."""
    adopt()
    published = [
        Publish(host_port=0, guest_port=8000),
        Publish(host_port=8080, guest_port=8000, host_address="own"),
        Publish(host_port=0, guest_port=8000, host_address=host6),
    ]
    async with AsyncHost(home, spares=0) as host:
        serve = ["python3", "-c", SERVE]
        stump = await host.run(image, serve, name="stump", memory_bytes=int(memory), network="passt")
        seen: dict[str, object] = {
            "out": [await python(stump, REACH, address, "8000") for address in (world4, world6)],
            "loopback": await python(stump, REACH, "10.0.2.2", port),
            "name": await python(stump, RESOLVE),
            "mtu": await python(stump, MTU),
        }
        async with asyncio.timeout(60):
            while await python(stump, LISTENS) != "stump":
                pass  # it is not up yet
        await stump.standby()
        await ended(0)
        forks = await stump.fork(2, names=["web"], atomic=True, publish=published)
        one, other = forks
        seen["passts"] = passts()
        seen["heard"] = [await heard(each) for each in forks]
        await one.standby()
        await ended(1)
        await one.restore()
        seen["restored"] = await heard(one)
        seen["forked out"] = await python(other, REACH, world6, "8000")
        process = other.record.vmm
        if process is None:
            raise AssertionError("the fork runs")
        os.kill(process.pid, signal.SIGKILL)
        await ended(1)
        for each in (one, other, stump):
            await each.rm()
        await ended(0)
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
