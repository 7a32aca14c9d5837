"""A server ends real machines at their time, and lets idle ones sleep."""

from __future__ import annotations

import asyncio
from pathlib import Path

from coppice.client import AsyncHost
from coppice.host import LocalBackend
from coppice.model import Instance, Publish, State
from coppice.server.serving import Listening
from fakes.supervising import until_removed, until_state
from servers import served

SERVE = """
import socket
server = socket.create_server(("", 80))
print("up", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello " + connection.recv(100))
    connection.close()
"""


async def test_lifetimes_of_real_machines(host: AsyncHost, vm: Instance, tmp_path: Path) -> None:
    """One fork is removed, and one is captured and can go on."""

    def make_host(owner: str | None) -> LocalBackend:
        return LocalBackend(host.home, owner=owner, spares=0, background="off")

    source = await host.get(vm.id)
    async with served(make_host, Listening(socket=tmp_path / "coppice.sock"), None):
        short = await source.fork_one(from_running=True, ttl_s=3)
        kept = await source.fork_one(from_running=True, ttl_s=3, on_expiry="standby")
        await until_removed(host, short.name)
        await until_state(host, kept.id, State.STANDBY)
    assert (await (await kept.refresh()).restore()).record.expires_at is None
    assert (await kept.exec(["echo", "on"])).stdout == b"on\n"
    await kept.rm()


async def test_an_idle_machine_sleeps_until_a_connection(host: AsyncHost, vm: Instance, tmp_path: Path) -> None:
    """A fork that serves a port is put into standby, and answers the connection that wakes it."""

    def make_host(owner: str | None) -> LocalBackend:
        return LocalBackend(host.home, owner=owner, spares=0, background="off")

    async def answer() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"there")
        async with asyncio.timeout(60):
            said = await reader.read()
        writer.close()
        return said

    async def connected() -> bytes:
        async with asyncio.timeout(60):
            while True:
                try:
                    return await answer()
                except ConnectionRefusedError:  # the server begins to listen right after the capture
                    await asyncio.sleep(0.05)

    source = await host.get(vm.id)
    served_port = [Publish(host_port=0, guest_port=80)]
    async with served(make_host, Listening(socket=tmp_path / "coppice.sock"), None):
        fork = await source.fork_one(from_running=True, publish=served_port, auto_standby_s=4)
        port = fork.record.publish[0].host_port
        start = f"setsid python3 -c '{SERVE}' >/srv/log 2>&1 & until grep -q up /srv/log; do sleep 0.1; done"
        assert (await fork.exec(["sh", "-c", start])).exit_code == 0
        assert await answer() == b"hello there"
        captured = await until_state(host, fork.id, State.STANDBY)
        assert captured.vmm is None
        assert await connected() == b"hello there"
        assert (await fork.refresh()).state is State.RUNNING
        await until_state(host, fork.id, State.STANDBY)
    await fork.rm()
