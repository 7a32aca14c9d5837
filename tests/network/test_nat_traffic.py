"""Traffic that a slot passes and traffic that it drops, with namespaces instead of machines."""

from __future__ import annotations

import socket

import msgspec
import pytest

from coppice.model import Instance, Publish
from coppice.network.nat.provider import NatNetwork
from fakes.records import MACHINE, make_instance
from worlds import HOST4, HOST6, WORLD4, WORLD6, World, guest

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


def new(*ports: Publish) -> Instance:
    """Return a record with this network."""
    return make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"), publish=ports)


@pytest.mark.parametrize("kind", [TCP, UDP])
@pytest.mark.parametrize(("host", "there"), [(HOST4, WORLD4), (HOST6, WORLD6)])
async def test_guests_reach_the_world_behind_the_hosts_address(
    world: World, provider: NatNetwork, kind: int, host: str, there: str
) -> None:
    """Two guests have the same address inside, and the world sees the host's address."""
    port = world.world.serve(there, 8000)
    one, other = new(), new()
    nics = [(await provider.attach(each))[0] for each in (one, other)]
    with guest(nics[0], provider.guest(one)) as first, guest(nics[1], provider.guest(other)) as second:
        for each in (first, second):
            assert each.ask(there, port, kind=kind) == host
    for instance in (one, other):
        await provider.detach(instance.id)


@pytest.mark.parametrize("address", [HOST4, HOST6])
async def test_open_connections_are_counted(world: World, provider: NatNetwork, address: str) -> None:
    """Those that the guest has accepted, also silent ones; not those that it has started."""
    instance = new(Publish(host_port=8084, guest_port=80, host_address="::" if ":" in address else "0.0.0.0"))
    (nic,) = await provider.attach(instance)
    assert await provider.connections(instance) == 0
    there = world.world.serve(WORLD4, 8000)
    with guest(nic, provider.guest(instance)) as own:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = own.run(lambda: socket.create_server(("", 80), family=family))
        client = world.world.run(lambda: socket.create_connection((address, 8084), 5.0))
        accepted = server.accept()[0]
        with server, accepted, client:
            started = own.run(lambda: socket.create_connection((WORLD4, there), 5.0))
            with started:
                assert started.recv(100)
                assert await provider.connections(instance) == 1
        assert client.fileno() == -1
        ended = own.run(lambda: socket.create_connection((WORLD4, there), 5.0))  # after the ends of the others
        with ended:
            assert ended.recv(100)
        assert await provider.connections(instance) == 0
    await provider.detach(instance.id)
    assert await provider.connections(instance) == 0


async def test_bytes_are_counted_in_the_directions_of_the_guest(world: World, provider: NatNetwork) -> None:
    """From its attachment on, and for each slot by itself."""
    one, other = new(), new()
    assert await provider.traffic(one) is None
    nics = [(await provider.attach(each))[0] for each in (one, other)]
    there = world.world.serve(WORLD4, 8000)
    with guest(nics[0], provider.guest(one)) as first, guest(nics[1], provider.guest(other)):
        quiet, before = await provider.traffic(other), await provider.traffic(one)
        assert quiet is not None
        assert before is not None

        def send() -> None:
            with socket.socket(socket.AF_INET, UDP) as asking:
                asking.settimeout(5.0)
                for _ in range(20):
                    asking.sendto(bytes(1000), (WORLD4, there))
                    asking.recv(100)

        first.run(send)
        after = await provider.traffic(one)
        assert after is not None
        assert 20_000 <= after.sent_bytes - before.sent_bytes < 25_000
        assert 20 * 40 <= after.received_bytes - before.received_bytes < 5000
        assert after.counted_by == "host"
        still = await provider.traffic(other)
        assert still is not None
        assert still.sent_bytes - quiet.sent_bytes < 2000
    for instance in (one, other):
        await provider.detach(instance.id)
    assert await provider.traffic(one) is None


async def test_published_ports_lead_to_the_guest(world: World, provider: NatNetwork) -> None:
    """The host reaches them by loopback and by its address, the world by its address only.

    After a detach they lead nowhere.
    """
    ports = (
        Publish(host_port=8080, guest_port=80),
        Publish(host_port=8081, guest_port=80, host_address="0.0.0.0"),
        Publish(host_port=8082, guest_port=80, host_address="127.64.3.4"),
        Publish(host_port=8083, guest_port=80, host_address="0.0.0.0", protocol="udp"),
        Publish(host_port=8084, guest_port=80, host_address="::"),
        Publish(host_port=8085, guest_port=80, host_address=HOST6, protocol="udp"),
        Publish(host_port=0, guest_port=80, host_address=HOST4),
    )
    instance = new(*ports)
    (nic,) = await provider.attach(instance)

    picked = (await provider.published(instance))[-1].host_port
    with guest(nic, provider.guest(instance)) as own:
        own.serve("0.0.0.0", 80)
        own.serve("::", 80)
        assert world.world.ask(HOST6, 8084)
        assert world.host.ask("127.0.0.1", 8080)
        assert world.host.ask("127.64.3.4", 8082)
        for outside in (world.world, world.host):  # the world first, while the neighbour tables are empty
            assert outside.ask(HOST4, 8081)
            assert outside.ask(HOST4, 8083, kind=UDP)
            assert outside.ask(HOST4, picked)
            assert outside.ask(HOST6, 8084)
            assert outside.ask(HOST6, 8085, kind=UDP)
        assert world.world.ask(HOST4, 8081) == WORLD4  # the guest sees the client's address
        assert not world.world.reaches(HOST4, 8080)
        await provider.detach(instance.id)
        assert not world.host.reaches("127.0.0.1", 8080)


@pytest.mark.parametrize("address", [HOST4, HOST6, "127.0.0.1"])
async def test_a_connection_stays_where_it_was_accepted(world: World, provider: NatNetwork, address: str) -> None:
    """A server accepted it on the port before that port led to the guest: it is not moved to the
    guest, also if the kernel tracks no connections until the first slot is made.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    outside = world.host if address == "127.0.0.1" else world.world
    with world.host.run(lambda: socket.create_server((address, 8080), family=family)) as server:
        client = outside.run(lambda: socket.create_connection((address, 8080), 5.0))
        accepted = server.accept()[0]
    instance = new(Publish(host_port=8080, guest_port=80, host_address=address))
    (nic,) = await provider.attach(instance)
    with guest(nic, provider.guest(instance)) as own, client, accepted:
        own.serve("0.0.0.0", 80)
        own.serve("::", 80)
        assert outside.ask(address, 8080)  # a new one reaches the guest
        accepted.settimeout(5.0)
        client.sendall(b"late")
        assert accepted.recv(100) == b"late"
        accepted.sendall(b"answer")
        assert client.recv(100) == b"answer"
    await provider.detach(instance.id)


async def test_a_guest_reaches_neither_the_host_nor_another_guest(world: World, provider: NatNetwork) -> None:
    """It reaches no address or published port of the host, and no other slot."""
    one = new()
    other = new(Publish(host_port=8081, guest_port=80, host_address="0.0.0.0"))
    nics = [(await provider.attach(each))[0] for each in (one, other)]
    open_port = world.host.serve("0.0.0.0", 9000)
    world.host.serve("::", 9001)
    slot = provider.slots.pool.find(other.id)
    assert slot is not None
    with guest(nics[0], provider.guest(one)) as first, guest(nics[1], provider.guest(other)) as second:
        second.serve("0.0.0.0", 80)
        assert world.host.reaches(HOST4, 8081)
        for address in ("fdc0:bb1c:e000::1", HOST6):
            assert not first.reaches(address, 9001)
        for address in ("198.18.0.1", HOST4):
            assert not first.reaches(address, open_port)
            assert not first.reaches(address, 8081)
        assert not first.reaches(str(slot.address4), 80)
        # A guest's packets to 127.0.0.1 must not reach the host's loopback, although its links pass
        # such addresses.
        first.run(lambda: _route_loopback_out(provider.guest(one).gateway))
        assert not first.reaches("127.0.0.1", open_port)
    for instance in (one, other):
        await provider.detach(instance.id)


def _route_loopback_out(gateway: str) -> None:
    from pathlib import Path

    from pyroute2 import IPRoute

    Path("/proc/sys/net/ipv4/conf/all/route_localnet").write_text("1")
    with IPRoute() as kernel:
        kernel.flush_addr(index=1)
        kernel.flush_routes(table=255, oif=1)
        kernel.route("replace", dst="127.0.0.0/8", gateway=gateway)
