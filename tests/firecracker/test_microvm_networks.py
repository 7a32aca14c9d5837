"""Forks on Firecracker with the network `nat` are online together, each at its own port."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from coppice.client import AsyncHost
from coppice.model import MIB, Publish
from coppice.model.kernel import Kernel

SERVE = """
import socket
server = socket.create_server(("0.0.0.0", 8000))
print("up", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(socket.gethostname().encode())
    connection.close()
"""
PORT = Publish(host_port=0, guest_port=8000)


def ask(port: int) -> str:
    """Return what the server behind a published port sends."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        return connection.recv(100).decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="slots need root")
async def test_forks_answer_at_ports_of_their_own(host: AsyncHost, image: str, kernel: Kernel) -> None:
    """A server in the template's memory answers in each fork, with the fork's name."""
    vm = await host.run(
        image, ["python3", "-c", SERVE], name="served", memory_bytes=256 * MIB, kernel=kernel.key, network="nat"
    )
    async with asyncio.timeout(60):
        async for line in vm.logs(follow=True):
            if b"up" in line:
                break
    template = await vm.freeze()
    async with template.fork(3, publish=[PORT], atomic=True) as forks:
        records = [(await host.get(fork.record.id)).record for fork in forks]
        said = await asyncio.gather(*(asyncio.to_thread(ask, record.publish[0].host_port) for record in records))
        assert said == [record.name for record in records]
    await template.rm()
