"""A server puts an idle machine with a slot into standby, and a connection from outside wakes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance, Publish, State
from coppice.network.nat.provider import NatNetwork
from fakes.supervising import until_state
from servers import SERVER_START_S
from worlds import HOST4, HOST6, World

IDLE_S = 5.0
ANSWER_S = 60.0
SERVE = """
import socket, threading
server = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True)
print("up", flush=True)
def answer(connection):
    with connection: connection.sendall(b"hello " + connection.recv(100))
while True:
    threading.Thread(target=answer, args=server.accept()[:1]).start()
"""


@contextlib.asynccontextmanager
async def served(host: AsyncHost, machine: Instance, world: World, listen: Path) -> AsyncIterator[None]:
    """Run `coppice serve` on the test's host for a block."""
    provider = host.local.rooms.networks.of(machine.machine)
    assert isinstance(provider, NatNetwork)
    words = [str(host.home), f"unix:{listen}", str(provider.slots.pool.root.parent)]
    process = await asyncio.create_subprocess_exec(
        *("nsenter", f"--net={world.host.path}", sys.executable, "-m", "network.serve_process", *words),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(SERVER_START_S):
            assert str(listen).encode() in await process.stdout.readline()
        yield
    finally:
        process.terminate()
        async with asyncio.timeout(SERVER_START_S):
            await process.wait()


async def connect(world: World, address: str, port: int) -> socket.socket:
    """Connect from outside as soon as the server listens: that is right after the capture."""
    async with asyncio.timeout(ANSWER_S):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return await asyncio.to_thread(
                    world.world.run, lambda: socket.create_connection((address, port), ANSWER_S)
                )
            await asyncio.sleep(0.05)


async def answer(client: socket.socket) -> bytes:
    """Send a word, and return the answer."""
    with client:
        await asyncio.to_thread(client.sendall, b"there")
        return await asyncio.to_thread(client.recv, 100)


@pytest.mark.timeout(400)
async def test_a_connection_from_outside_wakes_a_machine(
    nat_host: AsyncHost, nat_template: Instance, open_world: World, tmp_path: Path
) -> None:
    """By IPv4 and IPv6, and also a client that sends only when the machine runs and has its ports.

    The machine sleeps again when its connections have ended.
    """
    source = await nat_host.get(nat_template.id)
    ports = [Publish(host_port=0, guest_port=80, host_address=address) for address in (HOST4, HOST6)]
    async with (
        served(nat_host, nat_template, open_world, tmp_path / "coppice.sock"),
        source.fork(1, publish=ports, auto_standby_s=IDLE_S, atomic=True) as (fork,),
    ):
        places = [(each.host_address, each.host_port) for each in fork.record.publish]
        start = f"setsid python3 -c '{SERVE}' >/srv/log 2>&1 & until grep -q up /srv/log; do sleep 0.1; done"
        assert (await fork.exec(["sh", "-c", start])).exit_code == 0
        assert await answer(await connect(open_world, *places[0])) == b"hello there"
        captured = await until_state(nat_host, fork.id, State.STANDBY)
        assert captured.vmm is None
        assert await answer(await connect(open_world, *places[1])) == b"hello there"
        assert (await fork.refresh()).state is State.RUNNING
        await until_state(nat_host, fork.id, State.STANDBY)
        late = await connect(open_world, *places[0])
        await until_state(nat_host, fork.id, State.RUNNING)
        assert await answer(await connect(open_world, *places[0])) == b"hello there"
        assert await answer(late) == b"hello there"
        await until_state(nat_host, fork.id, State.STANDBY)
