"""Forks that run in parallel: the host reaches each at its own address, and each
reaches the host.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from coppice.client import AsyncHost
from coppice.errors import InUse
from coppice.model import Instance, Publish
from coppice.names import new_name
from coppice.requests import ExecRequest, ForkRequest, OpenExecRequest, RestoreRequest, RmRequest, StandbyRequest

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
    """Return what the server at the address sends."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(address, port)
        said = await reader.read()
        writer.close()
        await writer.wait_closed()
    return said.decode()


@contextlib.asynccontextmanager
async def serving(host: AsyncHost, fork: Instance) -> AsyncIterator[None]:
    """Let the fork send its hostname to each client during the block."""
    async with host.stream(OpenExecRequest(instance=fork.id, argv=["python3", "-c", SERVE], stdin=False)) as session:
        async for _, data in session:
            assert data == b"up\n"
            break
        yield


async def test_each_fork_is_reached_at_its_own_address(host: AsyncHost, template: Instance) -> None:
    """Forks answer with their own names on one port at two addresses, and on picked ports, and both
    reach a server of the host.
    """
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await heard.put((await reader.read()).decode())
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    report_to = server.sockets[0].getsockname()[1]
    wanted = [Publish(host_port=PORT, guest_port=8000, host_address="own"), Publish(host_port=0, guest_port=8000)]
    forks = (
        await host.call(
            ForkRequest(instance=template.id, count=2, names=[new_name("web")], atomic=True, publish=wanted)
        )
    ).instances
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
            results = await asyncio.gather(
                *(
                    host.call(ExecRequest(instance=fork.id, argv=["python3", "-c", tell], timeout_s=60))
                    for fork in forks
                )
            )
            assert [result.exit_code for result in results] == [0, 0], results
            async with asyncio.timeout(30):
                assert {await heard.get(), await heard.get()} == {one.name, other.name}
    finally:
        server.close()
        await server.wait_closed()
        for fork in forks:
            await host.call(RmRequest(instance=fork.id))


async def test_a_restored_fork_keeps_its_address_and_port(host: AsyncHost, template: Instance) -> None:
    """The restore is refused while another program has the port, and works afterwards."""
    wanted = [Publish(host_port=PORT, guest_port=8000, host_address="own"), Publish(host_port=0, guest_port=8000)]
    (fork,) = (
        await host.call(ForkRequest(instance=template.id, names=[new_name("web")], atomic=True, publish=wanted))
    ).instances
    try:
        parked = (await host.call(StandbyRequest(instance=fork.id))).instance
        assert parked.publish == fork.publish
        other = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", fork.publish[1].host_port)
        with pytest.raises(InUse, match=str(fork.publish[1].host_port)):
            await host.call(RestoreRequest(instance=fork.id))
        other.close()
        await other.wait_closed()
        restored = await host.call(RestoreRequest(instance=fork.id))
        assert restored.publish == fork.publish
        async with serving(host, restored):
            for port in restored.publish:
                assert await hear(port.host_address, port.host_port) == fork.name
    finally:
        await host.call(RmRequest(instance=fork.id))
