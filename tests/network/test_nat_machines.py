"""Real machines in slots: forks of one template are online in parallel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coppice.client import AsyncHost
from coppice.model import Egress, Instance, Publish
from coppice.names import new_name
from coppice.requests import (
    EgressRequest,
    ExecRequest,
    ForkRequest,
    OpenExecRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
    StartAheadRequest,
)
from worlds import HOST4, HOST6, WORLD4, WORLD6, World

SERVE = """
import socket
server = socket.create_server(("::", 8000), family=socket.AF_INET6, dualstack_ipv6=True)
print("up", flush=True)
while True:
    connection, peer = server.accept()
    connection.sendall(socket.gethostname().encode())
    connection.close()
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])) as s: print(s.recv(100).decode())
"""
PING = """
import socket, struct, sys
echo = struct.pack(">BBHHH", 8, 0, 0, 0, 1)
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s:
    s.settimeout(20)
    checksum = 0xffff - sum(struct.unpack(">4H", echo)) % 0xffff
    s.sendto(echo[:2] + struct.pack(">H", checksum) + echo[4:], (sys.argv[1], 0))
    while s.recv(100)[20] != 0: pass
"""


async def python(host: AsyncHost, vm: Instance, code: str, *words: object) -> tuple[int, str]:
    """Run Python in a guest; return its exit status and what it printed."""
    argv = ["python3", "-c", code, *map(str, words)]
    result = await host.call(ExecRequest(instance=vm.id, argv=argv, timeout_s=60))
    return result.exit_code, result.stdout.decode().strip()


@contextlib.asynccontextmanager
async def serving(host: AsyncHost, vm: Instance) -> AsyncIterator[None]:
    """Let the guest send its hostname to each client during the block."""
    async with host.stream(OpenExecRequest(instance=vm.id, argv=["python3", "-c", SERVE], stdin=False)) as session:
        async for _, data in session:
            assert data == b"up\n"
            break
        yield


@contextlib.asynccontextmanager
async def forked(host: AsyncHost, template: Instance, **request: Any) -> AsyncIterator[tuple[Instance, ...]]:
    """Yield forks, and remove them after the block."""
    request = {"names": [new_name("web")], "atomic": True, **request}
    forks = (await host.call(ForkRequest(instance=template.id, **request))).instances
    try:
        yield forks
    finally:
        for fork in forks:
            await host.call(RmRequest(instance=fork.id))


@pytest.mark.timeout(400)
async def test_two_forks_are_online_at_once(nat_host: AsyncHost, nat_template: Instance, open_world: World) -> None:
    """With IPv4 and IPv6, both reach the world behind the host's address and are reached by their
    own ports. Both can ping over IPv4.
    """
    port, port6 = open_world.world.serve(WORLD4, 0), open_world.world.serve(WORLD6, 0)
    ports = [
        Publish(host_port=0, guest_port=8000),
        Publish(host_port=8000, guest_port=8000, host_address="own"),
        Publish(host_port=0, guest_port=8000, host_address=HOST6),
    ]
    async with forked(nat_host, nat_template, count=2, publish=ports) as forks, contextlib.AsyncExitStack() as stack:
        for fork in forks:
            await stack.enter_async_context(serving(nat_host, fork))
        for fork in forks:
            for published in fork.publish:
                where = open_world.world if published.host_address == HOST6 else open_world.host
                heard = await asyncio.to_thread(where.ask, published.host_address, published.host_port, wait_s=30)
                assert heard == fork.name
        for there, its_port, seen in ((WORLD4, port, HOST4), (WORLD6, port6, HOST6)):
            answers = await asyncio.gather(*(python(nat_host, fork, ASK, there, its_port, 20) for fork in forks))
            assert answers == [(0, seen)] * 2
        assert [await python(nat_host, fork, PING, WORLD4) for fork in forks] == [(0, "")] * 2


@pytest.mark.timeout(400)
async def test_a_machine_reaches_what_its_policy_allows(
    nat_host: AsyncHost, nat_template: Instance, open_world: World
) -> None:
    """With `none` it reaches nothing, with names only these, and with `all` still not the host.

    A restore keeps the policy.
    """
    port = open_world.world.serve(WORLD4, 0)
    closed = open_world.host.serve("127.0.0.1", 0)
    everywhere = open_world.host.serve("0.0.0.0", 0)
    async with forked(nat_host, nat_template, egress=Egress(mode="none")) as (fork,):
        for there in (WORLD4, "out.example"):
            assert (await python(nat_host, fork, ASK, there, port, 5))[0] == 1
        policy = Egress(mode="allow", names=("in.example",))
        await nat_host.call(EgressRequest(instance=fork.id, policy=policy))
        assert (await python(nat_host, fork, ASK, WORLD4, port, 5))[0] == 1
        assert await python(nat_host, fork, ASK, "in.example", port, 20) == (0, HOST4)
        assert (await python(nat_host, fork, ASK, "out.example", port, 5))[0] == 1
        report = await nat_host.call(EgressRequest(instance=fork.id))
        assert report.policy == policy
        assert {"out.example", f"{WORLD4}:{port}/tcp"} <= {each.what for each in report.refused}
        await nat_host.call(StandbyRequest(instance=fork.id))
        await nat_host.call(RestoreRequest(instance=fork.id))
        assert (await python(nat_host, fork, ASK, WORLD4, port, 5))[0] == 1
        await nat_host.call(EgressRequest(instance=fork.id, policy=Egress()))
        assert await python(nat_host, fork, ASK, "out.example", port, 20) == (0, HOST4)
        for address, number in (("10.0.2.2", closed), ("198.18.0.1", everywhere), (HOST4, everywhere)):
            assert (await python(nat_host, fork, ASK, address, number, 3))[0] == 1


@pytest.mark.timeout(400)
async def test_forks_inherit_the_policy(nat_host: AsyncHost, nat_template: Instance, open_world: World) -> None:
    """A fork of a running machine or of its snapshot may reach no more than its source."""
    port = open_world.world.serve(WORLD4, 0)
    async with forked(nat_host, nat_template, egress=Egress(mode="none")) as (fork,):
        await nat_host.call(SnapshotRequest(instance=fork.id, name=fork.name))
        grown = (await nat_host.call(SnapshotForkRequest(snapshot=fork.name, atomic=True))).instances
        async with forked(nat_host, fork, from_running=True) as live:
            for each in (*grown, *live):
                assert each.egress == Egress(mode="none")
                assert (await python(nat_host, each, ASK, WORLD4, port, 3))[0] == 1
        for each in grown:
            await nat_host.call(RmRequest(instance=each.id))
        await nat_host.snapshots.rm(fork.name)


@pytest.mark.timeout(400)
async def test_a_fork_from_a_spare_has_the_requested_policy(
    nat_host: AsyncHost, nat_template: Instance, open_world: World
) -> None:
    """A spare is attached before the fork is requested, with its template's policy."""
    port = open_world.world.serve(WORLD4, 0)
    await nat_host.call(StartAheadRequest(instance=nat_template.id, count=2))
    async with (
        forked(nat_host, nat_template, egress=Egress(mode="none")) as (sealed,),
        forked(nat_host, nat_template) as (fork,),
    ):
        assert (await python(nat_host, sealed, ASK, WORLD4, port, 3))[0] == 1
        assert await python(nat_host, fork, ASK, WORLD4, port, 20) == (0, HOST4)
