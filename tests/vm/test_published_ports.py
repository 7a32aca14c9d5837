"""Forks online at once: the host reaches each at its own address, and each reaches the host."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from coppice.errors import InUse
from coppice.host import AsyncHost
from coppice.model import Instance, Publish
from coppice.names import new_name

PORT = 8000
SERVE = """
import socket, sys
server = socket.create_server(("0.0.0.0", 8000), reuse_port=True)
print("up", flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(socket.gethostname().encode())
    connection.close()
"""


async def hear(address: str, port: int) -> str:
    """What the server there says."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(address, port)
        said = await reader.read()
        writer.close()
        await writer.wait_closed()
    return said.decode()


@contextlib.asynccontextmanager
async def serving(host: AsyncHost, fork: Instance) -> AsyncIterator[None]:
    """For the length of a block the fork says its host name to whoever connects."""
    async with host.open_exec(fork, ["python3", "-c", SERVE], stdin=False) as session:
        async for _, data in session:
            assert data == b"up\n"
            break
        yield


async def test_two_forks_are_reached_each_at_its_own_address(host: AsyncHost, template: Instance) -> None:
    """The same port on two addresses, and one that was picked: each name is the fork's own. Each reaches a server of the host at the same time."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard.put((await reader.read()).decode())
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    report_to = server.sockets[0].getsockname()[1]
    wanted = [Publish(host_port=PORT, guest_port=8000, host_address="own"), Publish(host_port=0, guest_port=8000)]
    forks = (await host.fork(template, count=2, names=[new_name("web")], atomic=True, publish=wanted)).instances
    try:
        one, other = forks
        assert one.publish[0].host_address != other.publish[0].host_address
        assert one.publish[1].host_port != other.publish[1].host_port
        async with serving(host, one), serving(host, other):
            for fork in forks:
                for port in fork.publish:
                    assert await hear(port.host_address, port.host_port) == fork.name
            tell = (
                f"import socket; s = socket.create_connection(('10.0.2.2', {report_to}), 20); "
                "s.sendall(socket.gethostname().encode()); s.close()"
            )
            results = await asyncio.gather(*(host.exec(fork, ["python3", "-c", tell], timeout_s=60) for fork in forks))
            assert [result.exit_code for result in results] == [0, 0], results
            async with asyncio.timeout(30):
                assert {await heard.get(), await heard.get()} == {one.name, other.name}
    finally:
        server.close()
        await server.wait_closed()
        for fork in forks:
            await host.rm(fork)


async def test_a_restored_fork_is_where_it_was(host: AsyncHost, template: Instance) -> None:
    """At the same address and port, unless another has taken it: then it is refused, stays Standby, and can be restored when that is gone."""
    wanted = [Publish(host_port=PORT, guest_port=8000, host_address="own"), Publish(host_port=0, guest_port=8000)]
    (fork,) = (await host.fork(template, names=[new_name("web")], atomic=True, publish=wanted)).instances
    try:
        parked, _ = await host.standby(fork)
        assert parked.publish == fork.publish
        other = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", fork.publish[1].host_port)
        with pytest.raises(InUse, match=str(fork.publish[1].host_port)):
            await host.restore(fork)
        other.close()
        await other.wait_closed()
        restored = await host.restore(fork)
        assert restored.publish == fork.publish
        async with serving(host, restored):
            for port in restored.publish:
                assert await hear(port.host_address, port.host_port) == fork.name
    finally:
        await host.rm(fork)
