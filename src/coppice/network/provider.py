"""The contract between Coppice and a network provider, and the registry of providers.

A provider connects machines to a network. Its name is part of a machine's hardware
(`MachineSpec.network`), so a fork, a snapshot and a restored machine have the network of the
captured machine. Only `coppice.network` handles providers by name: callers get the provider of a
machine from `Networks`.

The life of a connection:

1. `check`: when ports are requested, before any side effect.
2. `allocate`: inside the transaction that records the instance. The instance's permanent properties
   are stored in its record.
3. `attach`: before its VMM starts. `permit`: when its egress policy changes, and before a spare's
   guest runs. `guest`: when the guest receives its identity. `published`: after its VMM started.
4. `detach`: after its VMM ended for any reason, and again when the instance is removed.
5. `leftovers`: the attachments of dead processes; `detach` removes them.

A provider keeps no state in a process between calls: another process may make the next call. It
must find an attachment again by the instance's id alone.

Cleanup: a call that raises may leave parts of its work; `detach` removes them. The caller detaches
after every failed `attach`, and a process that opens the data directory later detaches the
attachments of a killed caller.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from coppice.completion import in_thread
from coppice.errors import HostCannot, NotSupported, UsageError
from coppice.linux.tcp import count_connections
from coppice.model import ANY_PORT, Egress, EgressReport, Instance, MachineSpec, Publish, Traffic
from coppice.model.network import GuestNetwork, Nic, NicBackend, SlotCounts
from coppice.network.loopback import with_own_addresses
from coppice.network.ports import require_local


class NetworkProvider(ABC):
    """One kind of network."""

    name: str
    """The name stored in records and given on the command line."""

    backend: NicBackend | None
    """The backend that the VMM connects a NIC to. None if the network has no NICs, so that every
    driver supports it.
    """

    def missing(self) -> str:
        """Return what this host or process lacks for this network; empty if nothing. Blocks."""
        return ""

    def hindrance(self) -> str:
        """Return why guests on this network may reach nothing from this host, such as a firewall;
        empty if nothing hinders them. Blocks.

        Prerequisite: nothing is `missing`. A network with a hindrance is the default only if there is
        no other one.
        """
        return ""

    @abstractmethod
    def check(self, ports: Sequence[Publish]) -> None:
        """Refuse published ports that this network can never forward. Does not look at the host.

        Prerequisite: the ports passed `coppice.addresses.check_publish`.

        :raises UsageError: a port cannot be published on this network; the message says which
        """

    def check_addresses(self, ports: Sequence[Publish]) -> None:
        """Refuse addresses that this host does not have, as `require_local`.

        :raises HostCannot: the message says which
        """
        require_local(ports)

    def allocate(self, connection: sqlite3.Connection, instances: Sequence[Instance]) -> list[Instance]:
        """Return new instances with their permanent properties: addresses of their own. Blocks.

        Prerequisite: `connection` is in the transaction that will record the instances. All of them
        have this network.

        Effect: none outside the transaction, and nothing to clean up: removing the record frees
        everything.

        :raises NoSpace: an address pool is exhausted; the caller rolls the transaction back
        """
        return with_own_addresses(connection, instances)

    @abstractmethod
    async def attach(self, instance: Instance) -> tuple[Nic, ...]:
        """Prepare the host's side of the network, and return the NICs for the VMM. Idempotent.

        Prerequisite: the caller holds the instance's lock, and its VMM does not run. The instance
        is recorded, or it is a spare: a fork without record and published ports, which is recorded
        later under the same id.

        A first boot, every restore and every fork get the same number of NICs: the captured device
        state has them.

        :raises InUse: another program has a port that the instance publishes
        :raises HostCannot: the host's side cannot be made ready
        """

    @abstractmethod
    def guest(self, instance: Instance) -> GuestNetwork | None:
        """Return the network configuration that the guest receives, or None if it has no NIC.

        Has no side effect.
        """

    @abstractmethod
    async def published(self, instance: Instance) -> tuple[Publish, ...]:
        """Return the instance's published ports, with the picked host port in place of each 0.

        They are recorded.

        Prerequisite: its VMM runs with the NICs of `attach`, and this process attached them or the
        network publishes ports only now.

        :raises HostCannot: no port is free
        """

    def check_egress(self, policy: Egress) -> None:
        """Refuse a policy that this network does not enforce.

        :raises UsageError: it does not
        """
        if policy != Egress():
            raise UsageError(f"the network {self.name!r} does not enforce egress policies", hint="use `--network nat`")

    async def permit(self, instance: Instance) -> None:  # noqa: B027 - most networks have nothing to do
        """Apply the policy in an instance's record to its attachment.

        Idempotent; does nothing if it is not attached.

        Prerequisite: `check_egress` accepts the policy, and the caller holds the instance's lock.

        :raises HostCannot: the policy cannot be changed
        """

    async def egress(self, instance: Instance) -> EgressReport:
        """Return the egress policy of an instance, and what it blocked since the instance was
        attached.

        :raises HostCannot: the counters cannot be read
        """
        return EgressReport(policy=instance.egress)

    async def connections(self, instance: Instance) -> int:
        """Return how many TCP connections to published ports of a running machine are open now."""
        ports = [port for port in instance.publish if port.protocol == "tcp" and port.host_port != ANY_PORT]
        return sum([await in_thread(count_connections, port.host_address, port.host_port) for port in ports])

    async def traffic(self, instance: Instance) -> Traffic | None:  # noqa: ARG002 - for networks that count
        """Return how many bytes this host has passed to and from the guest since the instance was attached.

        None: this network does not count them, or the instance is not attached.

        :raises HostCannot: the counters cannot be read
        """
        return None

    @abstractmethod
    async def detach(self, instance_id: str) -> None:
        """Release everything that `attach` made for an instance.

        Idempotent: the instance may not be attached.

        Prerequisite: no VMM of the instance runs, and the caller holds its lock.

        :raises HostCannot: something is left; a later call tries again
        """

    def slot_counts(self) -> SlotCounts | None:
        """Count the slots; None if the network has none that are made ahead of time. Blocks."""
        return None

    def leftovers(self, known: Callable[[], set[str]]) -> set[str]:  # noqa: ARG002 - most networks leave nothing
        """Return the ids that have an attachment but no record. Blocks.

        Read the attachments first, and then call `known`, which reads the ids of all records: an
        instance is recorded before it is attached. Before it detaches an id, the caller takes its
        lock and looks up its record again.
        """
        return set()


def reachable(address: str) -> str:
    """Return an address at which this host reaches what is published on `address`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - compared


class Networks:
    """The providers of one data directory."""

    def __init__(self, providers: Iterable[NetworkProvider], preferred: str | None = None) -> None:
        """Set the network of new machines that name none.

        It is `preferred` if the machine's driver can attach it, or else the first provider that
        this host can provide.
        """
        self.providers = tuple(providers)
        self._preferred = preferred
        self._by_name = {provider.name: provider for provider in self.providers}

    def of(self, machine: MachineSpec) -> NetworkProvider:
        """Return the provider of a machine.

        :raises NotSupported: this Coppice does not know the network in the record
        """
        try:
            return self._by_name[machine.network]
        except KeyError:
            raise NotSupported(
                f"the machine has the network {machine.network!r}, which this version does not know",
                hint="use the version of Coppice that made the machine",
            ) from None

    def choose(self, name: str | None, able: frozenset[NicBackend]) -> str:
        """Return the network of a new machine, which a driver with the backends `able` attaches:
        `name`, or the default. Blocks.

        :raises UsageError: there is no network of that name
        :raises NotSupported: the driver cannot attach it
        :raises HostCannot: none is named, and this host can provide none that the driver attaches
        """
        if name is None:
            return self._default(able)
        _require_backend(self._named(name), able)
        return name

    def _named(self, name: str) -> NetworkProvider:
        if name not in self._by_name:
            raise UsageError(f"there is no network {name!r}", hint=f"use {' or '.join(self._by_name)}")
        return self._by_name[name]

    def _default(self, able: frozenset[NicBackend]) -> str:
        if self._preferred and _attachable(self._named(self._preferred), able):
            return self._preferred
        connecting = [each for each in self.providers if each.backend in able]
        missing = {each.name: each.missing() for each in connecting}
        possible = [each for each in connecting if not missing[each.name]]
        for each in possible:
            if not each.hindrance():
                return each.name
        if possible:
            return possible[0].name
        if connecting:
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in missing.items())
            raise HostCannot(
                f"this host has no network for the machine ({reasons})",
                hint="run as root, or make it with `--network none`; `coppice doctor` checks what networks need",
            )
        return next(each.name for each in self.providers if each.backend is None)

    def kept(self, name: str, able: frozenset[NicBackend]) -> str:
        """Return `name` if a driver with the backends `able` can attach that network, or else the
        network of a new machine. Blocks.

        :raises HostCannot: this host can provide none that the driver attaches
        """
        provider = self._by_name.get(name)
        return name if provider is not None and _attachable(provider, able) else self._default(able)

    def check(self, machine: MachineSpec, ports: Sequence[Publish], egress: Egress | None = None) -> None:
        """Refuse ports that the network of a machine can never forward, addresses that this host does
        not have, and a policy that the network does not enforce.

        :raises UsageError: the message says which
        :raises HostCannot: an address is not this host's
        """
        provider = self.of(machine)
        provider.check(ports)
        provider.check_addresses(ports)
        if egress is not None:
            provider.check_egress(egress)

    def allocate(self, connection: sqlite3.Connection, instances: Sequence[Instance]) -> list[Instance]:
        """Call `NetworkProvider.allocate` for instances of any network; return them in the same
        order.
        """
        groups: dict[str, list[Instance]] = {}
        for instance in instances:
            groups.setdefault(instance.machine.network, []).append(instance)
        made = {
            instance.id: instance
            for group in groups.values()
            for instance in self.of(group[0].machine).allocate(connection, group)
        }
        return [made[instance.id] for instance in instances]

    async def attach(self, instance: Instance, able: frozenset[NicBackend]) -> tuple[Nic, ...]:
        """Call `NetworkProvider.attach` for a machine that a driver with the backends `able` will
        start.

        :raises NotSupported: the driver cannot attach this network
        :raises InUse: another program has a port that the instance publishes
        :raises HostCannot: the host's side cannot be made ready
        """
        provider = self.of(instance.machine)
        _require_backend(provider, able)
        return await provider.attach(instance)

    async def detach(self, instance_id: str) -> None:
        """Call `NetworkProvider.detach` of all providers.

        An attachment may have no record that names its network.

        :raises HostCannot: something is left
        """
        for provider in self.providers:
            await provider.detach(instance_id)

    def slot_counts(self) -> dict[str, SlotCounts]:
        """Return the counts of each network that has slots. Blocks."""
        counts = ((provider.name, provider.slot_counts()) for provider in self.providers)
        return {name: found for name, found in counts if found is not None}

    def leftovers(self, known: Callable[[], set[str]]) -> set[str]:
        """Return the ids with an attachment of any provider and no record. Blocks."""
        return {key for provider in self.providers for key in provider.leftovers(known)}


def _attachable(provider: NetworkProvider, able: frozenset[NicBackend]) -> bool:
    return provider.backend is None or provider.backend in able


def _require_backend(provider: NetworkProvider, able: frozenset[NicBackend]) -> None:
    if not _attachable(provider, able):
        raise NotSupported(
            f"this VMM cannot attach the network {provider.name!r}", hint="use another --network, or another VMM"
        )
