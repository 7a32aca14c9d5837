"""User-mode networks: each VMM has its own TCP/IP stack and listens on the host ports that its
guest publishes.

All guests have the same address, the default of QEMU's `-netdev user`: each is alone on its
network, so the addresses never conflict. On the host, an instance can have its own loopback
address. On Linux all of 127.0.0.0/8 is this host, so this needs no configuration.
"""

from __future__ import annotations

import hashlib
import ipaddress
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from coppice.completion import in_thread
from coppice.errors import NoSpace, UsageError
from coppice.model import OWN_ADDRESS, Instance, Publish
from coppice.model.network import GuestNetwork, Nic, NicBackend
from coppice.network.mac import mac_address
from coppice.network.ports import Picks, require_free
from coppice.network.provider import NetworkProvider

_ADDRESS = "10.0.2.15/24"
_GATEWAY = "10.0.2.2"
_DNS = ("10.0.2.3",)

# A quarter of the loopback addresses. The search starts at a hash of the instance's id: data
# directories, which do not know of each other, then seldom pick the same address.
_POOL = "127.64.0.0/10"
_IN_USE = """
    SELECT DISTINCT json_extract(port.value, '$.host_address')
    FROM instances, json_each(CAST(record AS TEXT), '$.publish') AS port
"""


class UserNetwork(NetworkProvider):
    """The provider `user`."""

    def __init__(self, database: Path | None = None) -> None:
        """`database` is as for `Picks`."""
        self._picks = Picks(database)

    @property
    def name(self) -> str:
        return "user"

    @property
    def backend(self) -> NicBackend:
        return NicBackend.USER_MODE

    def check(self, ports: Sequence[Publish]) -> None:
        for port in ports:
            if ":" in port.host_address:  # no release of QEMU parses such an address in hostfwd=
                raise UsageError(
                    f"a user-mode network cannot publish a port of the IPv6 address {port.host_address}",
                    hint="publish it on 127.0.0.1, on `own`, or on 0.0.0.0 for every IPv4 address of this host",
                )

    def allocate(self, connection: sqlite3.Connection, instances: Sequence[Instance]) -> list[Instance]:
        if not any(port.host_address == OWN_ADDRESS for instance in instances for port in instance.publish):
            return list(instances)
        taken = loopback_in_use(connection)
        return [with_own_address(instance, taken) for instance in instances]

    async def attach(self, instance: Instance) -> tuple[Nic, ...]:
        forwards: tuple[Publish, ...] = ()
        if instance.publish:
            await in_thread(require_free, instance)
            forwards = await in_thread(self._picks.hold, instance)
        return (Nic(backend=self.backend, mac=mac_address(instance.id), forwards=forwards),)

    def guest(self, instance: Instance) -> GuestNetwork:
        return GuestNetwork(mac=mac_address(instance.id), address=_ADDRESS, gateway=_GATEWAY, dns=_DNS)

    async def published(self, instance: Instance) -> tuple[Publish, ...]:
        return self._picks.release(instance.id) or instance.publish

    async def detach(self, instance_id: str) -> None:
        """Hold no ports any more. The network ended with its VMM."""
        self._picks.release(instance_id)

    def leftovers(self, known: Callable[[], set[str]]) -> set[str]:  # noqa: ARG002
        return set()


def loopback_in_use(connection: sqlite3.Connection) -> set[str]:
    """Return the addresses that recorded instances publish ports on."""
    return {row[0] for row in connection.execute(_IN_USE)}


def with_own_address(instance: Instance, taken: set[str]) -> Instance:
    """Return an instance with a loopback address in place of each `own`, and add the address to
    `taken`.

    :raises NoSpace: all addresses are in use
    """
    if all(port.host_address != OWN_ADDRESS for port in instance.publish):
        return instance
    pool = ipaddress.IPv4Network(_POOL)
    size = pool.num_addresses
    if len(taken) >= size:
        raise NoSpace("no loopback address is left", hint="remove instances, or publish without `own`")
    number = int.from_bytes(hashlib.sha256(instance.id.encode()).digest()[:4]) % size
    while (address := str(pool[number])) in taken:
        number = (number + 1) % size
    taken.add(address)
    return msgspec.structs.replace(
        instance,
        publish=tuple(
            msgspec.structs.replace(port, host_address=address) if port.host_address == OWN_ADDRESS else port
            for port in instance.publish
        ),
    )
