"""Egress policies decide what a guest reaches, by address and by name, and can change
at any time.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import dns.message
import dns.rcode
import msgspec
import pytest

from coppice.model import Egress, Instance
from coppice.network.nat.addresses import GATEWAY4
from coppice.network.nat.provider import NatNetwork
from fakes.records import MACHINE, make_instance
from slots import ended, resolve
from worlds import HOST6, REFUSED_S, WORLD4, WORLD6, World, guest


async def permit(provider: NatNetwork, instance: Instance, policy: Egress) -> None:
    """Change what the guest of an instance may reach."""
    await provider.permit(msgspec.structs.replace(instance, egress=policy))


async def test_a_policy_holds_from_the_next_packet_on(world: World, provider: NatNetwork) -> None:
    """A change of policy also ends open connections."""
    for address in (WORLD4, WORLD6):
        world.world.serve(address, 8000)
        world.world.serve(address, 8001)
    instance = make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"), egress=Egress(mode="none"))
    (nic,) = await provider.attach(instance)
    with guest(nic, provider.guest(instance)) as own:
        assert not any(own.reaches(address, 8000) for address in (WORLD4, WORLD6))
        await permit(provider, instance, Egress())
        assert all(own.reaches(address, 8000) for address in (WORLD4, WORLD6))
        listening = world.world.run(lambda: socket.create_server((WORLD4, 8100)))
        with listening, own.run(lambda: socket.create_connection((WORLD4, 8100), 5)) as open_one:
            served, _ = listening.accept()
            with served:
                served.settimeout(5)
                open_one.sendall(b"1")
                assert served.recv(1) == b"1"
                await permit(provider, instance, Egress(mode="allow", networks=("203.0.113.64/26", "2001:db8::/64")))
                served.settimeout(1)
                with pytest.raises(OSError):  # noqa: PT012 - the reset may come with either
                    open_one.sendall(b"2")
                    served.recv(1)
        assert not own.reaches(WORLD4, 8000)
        assert own.reaches(WORLD6, 8000)
        await permit(provider, instance, Egress(mode="allow", networks=(f"{WORLD4}/32",)))
        assert own.reaches(WORLD4, 8000)
        assert not own.reaches(WORLD6, 8000)
        report = await provider.egress(instance)
        assert report.passed_packets > 0
        assert report.refused_packets > 0
        assert {f"{WORLD4}:8000/tcp", f"[{WORLD6}]:8000/tcp"} <= {each.what for each in report.refused}
    await provider.detach(instance.id)


async def test_all_excludes_this_host_and_the_link(world: World, provider: NatNetwork, name_server: None) -> None:
    """The metadata service of a cloud host is on the link.

    The host's name server resolves names.
    """
    world.world.serve("0.0.0.0", 8000)
    world.host.serve("::", 8001)
    instance = make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"))
    (nic,) = await provider.attach(instance)
    with guest(nic, provider.guest(instance)) as own:
        assert own.reaches(WORLD4, 8000)
        assert not own.reaches("169.254.169.254", 80)
        assert not own.reaches(HOST6, 8001)
        assert resolve(own, "out.example") == WORLD4
        refused = {each.what for each in (await provider.egress(instance)).refused}
        assert "169.254.169.254:80/tcp" in refused
    await provider.detach(instance.id)


async def test_a_guest_reaches_only_names_that_are_allowed(
    world: World, provider: NatNetwork, name_server: None
) -> None:
    """It reaches the addresses of an allowed name after it has asked for that name.

    Refused names are in the report.
    """
    world.world.serve(WORLD4, 8000)
    policy = Egress(mode="allow", names=("in.example", "*.in.example"))
    instance = make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"), egress=policy)
    (nic,) = await provider.attach(instance)
    with guest(nic, provider.guest(instance)) as own:
        assert not own.reaches(WORLD4, 8000)
        assert resolve(own, "out.example") == "REFUSED"
        assert not own.reaches(WORLD4, 8000)
        assert resolve(own, "DEEP.in.example") == WORLD4
        assert own.reaches(WORLD4, 8000)
        assert resolve(own, "in.example", tcp=True) == WORLD4
        assert resolve(own, "metadata.in.example") == "169.254.169.254"
        assert not own.reaches("169.254.169.254", 80)
        assert resolve(own, "none.in.example") == "NXDOMAIN"
        assert "out.example" in {each.what for each in (await provider.egress(instance)).refused}
        await permit(provider, instance, Egress(mode="allow", names=("other.example",)))
        assert not own.reaches(WORLD4, 8000)
    await provider.detach(instance.id)
    await ended(provider)


async def test_a_change_of_policy_ends_open_name_queries(world: World, provider: NatNetwork, name_server: None) -> None:
    """A socket that has asked under `all` must get no answer under a list or under none, else it
    would bypass the filter.
    """
    instance = make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"))
    (nic,) = await provider.attach(instance)
    with guest(nic, provider.guest(instance)) as own:
        asking = own.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        asking.settimeout(5)
        asking.connect((str(GATEWAY4), 53))
        question = dns.message.make_query("out.example", "A").to_wire()

        def answered() -> bool:
            try:
                asking.send(question)
                return dns.message.from_wire(asking.recv(512)).rcode() == dns.rcode.NOERROR
            except OSError:
                return False

        with asking:
            assert answered()
            asking.settimeout(REFUSED_S)
            for policy in (Egress(mode="allow", names=("in.example",)), Egress(mode="none")):
                await permit(provider, instance, policy)
                assert not answered()
    await provider.detach(instance.id)
    await ended(provider)


async def test_a_resolver_on_the_hosts_loopback_works(
    world: World, provider: NatNetwork, name_server: None, resolv_conf: Path
) -> None:
    """Slots cannot reach a resolver on the host's loopback, so the filter asks it for them."""
    relay = world.host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    relay.bind(("127.0.0.53", 53))
    ask = world.host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    ask.settimeout(5)

    def answer_one() -> None:
        data, peer = relay.recvfrom(4096)
        ask.sendto(data, (WORLD4, 53))
        relay.sendto(ask.recv(4096), peer)

    resolv_conf.write_text("nameserver 127.0.0.53\n")
    instance = make_instance(machine=msgspec.structs.replace(MACHINE, network="nat"))
    (nic,) = await provider.attach(instance)
    with relay, ask, guest(nic, provider.guest(instance)) as own:
        answering = asyncio.create_task(asyncio.to_thread(answer_one))
        assert await asyncio.to_thread(resolve, own, "out.example") == WORLD4
        await answering
    await provider.detach(instance.id)
    await ended(provider)
