"""The contract of network/provider.py as tests that any provider must pass: a subclass names the
provider.

class TestMyNetwork(NetworkContract):
    @pytest.fixture
    def provider(self, ...) -> NetworkProvider: ...
"""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable
from ipaddress import ip_address, ip_interface
from pathlib import Path

import msgspec
import pytest

from coppice.errors import InUse, UsageError
from coppice.model import Instance, Publish
from coppice.network import NetworkProvider, Networks
from fakes.records import MACHINE, make_instance

ANY = Publish(host_port=0, guest_port=80)
OWN = Publish(host_port=8080, guest_port=80, host_address="own")


Listens = Callable[[], socket.socket]


class NetworkContract:
    """The properties of a provider that every caller relies on."""

    @pytest.fixture
    def publishes(self, provider: NetworkProvider) -> bool:
        """Return whether the network can publish ports at all."""
        return provider.backend is not None

    def new(self, provider: NetworkProvider, *ports: Publish) -> Instance:
        """Return a record with this network."""
        machine = msgspec.structs.replace(MACHINE, network=provider.name)
        return make_instance(machine=machine, publish=ports)

    @pytest.fixture
    def listens(self) -> Listens:
        """Return how another program on the provider's host listens on a port."""
        return lambda: socket.create_server(("127.0.0.1", 0))

    @pytest.fixture
    def connection(self) -> sqlite3.Connection:
        """Return a database without any instance."""
        connection = sqlite3.connect(":memory:")
        connection.execute("CREATE TABLE instances (record BLOB)")
        return connection

    def record(self, connection: sqlite3.Connection, *instances: Instance) -> None:
        """Store records as the store does."""
        rows = [(msgspec.json.encode(instance),) for instance in instances]
        connection.executemany("INSERT INTO instances (record) VALUES (?)", rows)

    def test_the_record_chooses_the_network(self, provider: NetworkProvider) -> None:
        """A registry finds the network by its name in a record, and a driver that supports its
        backend can use it.
        """
        networks = Networks([provider])
        able = frozenset() if provider.backend is None else frozenset({provider.backend})
        assert networks.choose(None, able) == networks.choose(provider.name, able) == provider.name
        assert networks.of(self.new(provider).machine) is provider

    def test_what_is_allocated_is_in_the_record(
        self, provider: NetworkProvider, connection: sqlite3.Connection, publishes: bool
    ) -> None:
        """Addresses are allocated in the requested order. Nothing else in the records changes, and
        no two instances, old or new, share an address.
        """
        ports = (OWN, ANY) if publishes else ()
        given: list[Instance] = []
        for _ in range(3):
            asked = [self.new(provider, *ports) for _ in range(4)]
            made = provider.allocate(connection, asked)
            assert [msgspec.structs.replace(each, publish=ports) for each in made] == asked
            self.record(connection, *made)
            given += made
        addresses = [each.publish[0].host_address for each in given if each.publish]
        assert len(set(addresses)) == len(addresses) == (12 if publishes else 0)
        assert all(ip_address(address) for address in addresses)

    async def test_a_nic_is_attached_for_each_start(self, provider: NetworkProvider) -> None:
        """An attachment can be repeated, even after a detach: it gives the same NICs of the
        declared backend. Another instance gets others.

        The NICs' location on the host may change after a detach.
        """
        instance, other = self.new(provider), self.new(provider)
        nics = await provider.attach(instance)
        assert await provider.attach(instance) == nics
        await provider.detach(instance.id)
        again = await provider.attach(instance)
        assert [msgspec.structs.replace(nic, namespace="") for nic in again] == [
            msgspec.structs.replace(nic, namespace="") for nic in nics
        ]
        assert {nic.backend for nic in nics} == ({provider.backend} if provider.backend is not None else set())
        others = await provider.attach(other)
        assert len(others) == len(nics)
        assert not {nic.mac for nic in nics} & {nic.mac for nic in others}
        for each in (instance, other):
            await provider.detach(each.id)

    async def test_the_guests_network_matches_its_nic(self, provider: NetworkProvider) -> None:
        """The MAC is the NIC's, locally administered and unicast; gateway and name servers are
        addresses. Without a NIC the guest gets no network.
        """
        instance = self.new(provider)
        nics = await provider.attach(instance)
        guest = provider.guest(instance)
        assert (guest is None) == (nics == ())
        if guest is not None:
            assert [nic.mac for nic in nics] == [guest.mac]
            assert int(guest.mac[:2], 16) & 3 == 2
            assert ip_address(guest.gateway) in ip_interface(guest.address).network
            assert all(ip_address(server) for server in guest.dns)
        await provider.detach(instance.id)

    async def test_ports_are_picked(self, provider: NetworkProvider, publishes: bool) -> None:
        """A port 0 becomes a number of its own, which the kernel gives to no program."""
        fixed = (Publish(host_port=8080, guest_port=80),) if publishes else ()
        assert await provider.published(self.new(provider, *fixed)) == fixed
        if not publishes:
            return
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        instances = [self.new(provider, *ports) for ports in ((*fixed, ANY, ANY), (ANY,), (ANY,))]
        nics = [await provider.attach(instance) for instance in instances]
        assert await provider.attach(instances[0]) == nics[0]
        told = [await provider.published(instance) for instance in instances]
        assert told[0][:1] == fixed
        numbers = [port.host_port for ports in told for port in ports]
        assert len(set(numbers)) == len(numbers) == 5
        assert not any(first <= number <= last for number in numbers[1:])
        for instance in instances:
            await provider.detach(instance.id)

    async def test_a_port_in_use_is_refused_before_a_vmm_starts(
        self, provider: NetworkProvider, publishes: bool, listens: Listens
    ) -> None:
        """The error names the port. Networks attached so far can be detached."""
        if not publishes:
            with pytest.raises(UsageError) as refused:
                provider.check([ANY])
            assert refused.value.hint
            return
        with listens() as other:
            number = other.getsockname()[1]
            instance = self.new(provider, Publish(host_port=number, guest_port=80))
            with pytest.raises(InUse, match=str(number)):
                await provider.attach(instance)
        await provider.detach(instance.id)
        assert provider.leftovers(set) == set()

    async def test_leftovers_are_found_and_removed(self, provider: NetworkProvider) -> None:
        """Any process finds the attachments without a record, and no others. A detach leaves
        nothing, and can be repeated.
        """
        kept, lost = self.new(provider), self.new(provider)
        for each in (kept, lost):
            await provider.attach(each)
        assert provider.leftovers(lambda: {kept.id, lost.id}) == set()
        assert provider.leftovers(lambda: {kept.id}) <= {lost.id}
        for _ in range(2):
            await provider.detach(lost.id)
            assert provider.leftovers(lambda: {kept.id}) == set()
        await provider.detach(kept.id)
        assert provider.leftovers(set) == set()
