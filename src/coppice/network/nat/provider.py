"""The provider `nat`: each instance has a slot, made in advance.

All guests have the same address, so a fork finds the network as its source left it, except for its
own MAC. Outside, each slot has its own address behind this host's.

The code for slots is imported at the first slot: a command that lists machines does not need it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.completion import in_thread
from coppice.errors import UsageError
from coppice.model import ANY_PORT, Egress, EgressReport, Instance, Publish, Traffic
from coppice.model.network import GuestNetwork, Nic, NicBackend, SlotCounts
from coppice.network.mac import mac_address
from coppice.network.nat import RUNTIME, is_wanted, key_of, rows
from coppice.network.ports import require_local
from coppice.network.provider import NetworkProvider

if TYPE_CHECKING:
    from coppice.network.nat.pool import Pool
    from coppice.network.nat.slots import Slots


class NatNetwork(NetworkProvider):
    """Slots of one data directory."""

    name = "nat"
    backend = NicBackend.TAP

    def __init__(self, home: Path, pool: Pool | None = None) -> None:
        """`pool` replaces the data directory's own."""
        self._home = home
        self._database = home / "coppice.db"
        self._given = pool

    @functools.cached_property
    def slots(self) -> Slots:
        """The operations on slots, all of which block."""
        from coppice.network.nat.pool import Pool
        from coppice.network.nat.slots import Slots

        return Slots(self._given or Pool(key_of(self._home)), self._database)

    def _is_used(self) -> bool:
        """Return whether the data directory may have slots."""
        # The key takes long to compute, and most hosts have no slots at all.
        return bool(self._given or (RUNTIME.exists() and any(RUNTIME.iterdir()))) and self._root().exists()

    def _root(self) -> Path:
        return self._given.root if self._given else RUNTIME / key_of(self._home)

    def missing(self) -> str:
        from coppice.network.nat.rights import missing_rights

        return missing_rights()

    def hindrance(self) -> str:
        from coppice.network.nat import surroundings

        return surroundings.hindrance()

    def check(self, ports: Sequence[Publish]) -> None:
        for port in ports:
            if port.host_address == "::1":  # the kernel forwards nothing from this address
                raise UsageError(
                    "a network of slots cannot publish a port of ::1",
                    hint="publish it on 127.0.0.1, on `own`, or on another address of this host",
                )

    def check_addresses(self, ports: Sequence[Publish]) -> None:
        """Look in the network namespace that has the addresses."""
        if ports:
            from coppice.linux import netns

            netns.inside(self._given.host if self._given else None, lambda: require_local(ports))

    def check_egress(self, policy: Egress) -> None:
        """Accept every policy: all are enforced."""

    async def attach(self, instance: Instance) -> tuple[Nic, ...]:
        from coppice.network.nat.addresses import TAP

        slot = await in_thread(self.slots.attach, instance)
        return (Nic(backend=self.backend, mac=mac_address(instance.id), tap=TAP, namespace=str(slot.namespace)),)

    def guest(self, instance: Instance) -> GuestNetwork:
        from coppice.network.nat import addresses

        return GuestNetwork(
            mac=mac_address(instance.id),
            address=f"{addresses.GUEST4}/{addresses.INSIDE4.prefixlen}",
            gateway=str(addresses.GATEWAY4),
            dns=(str(addresses.GATEWAY4),),
            mtu=self.slots.pool.mtu,
            address6=f"{addresses.GUEST6}/{addresses.INSIDE6.prefixlen}",
            gateway6=str(addresses.GATEWAY6),
        )

    async def published(self, instance: Instance) -> tuple[Publish, ...]:
        if all(port.host_port != ANY_PORT for port in instance.publish):
            return instance.publish
        return await in_thread(self.slots.pick_ports, instance)

    async def connections(self, instance: Instance) -> int:
        """Every connection that the guest has accepted counts."""
        return await in_thread(self.slots.connections, instance) if self._is_used() else 0

    async def traffic(self, instance: Instance) -> Traffic | None:
        """Return the counters of the slot's TAP. A slot is made for one instance and removed after it."""
        return await in_thread(self.slots.traffic, instance) if self._is_used() else None

    async def permit(self, instance: Instance) -> None:
        if self._is_used():
            await in_thread(self.slots.permit, instance)

    async def egress(self, instance: Instance) -> EgressReport:
        if self._is_used():
            return await in_thread(self.slots.egress, instance)
        return EgressReport(policy=instance.egress)

    async def detach(self, instance_id: str) -> None:
        if self._is_used():
            await in_thread(self.slots.detach, instance_id)

    def leftovers(self, known: Callable[[], set[str]]) -> set[str]:
        """Do as the contract says, and remove the partial slots of killed processes, which have no
        id.
        """
        if not self._is_used():
            return set()
        pool, used = self._root(), set(rows(self._root(), "used"))
        # Most commands find nothing to do, and the code for slots takes milliseconds to import.
        if any(rows(pool, each) for each in ("making", "removing", "egress")) or not (
            used or is_wanted(self._database)
        ):
            return self.slots.leftovers(known)
        return used - known()

    def slot_counts(self) -> SlotCounts:
        """Count the slots of the data directory."""
        if not self._is_used():
            return SlotCounts(used=0, free=0)
        return SlotCounts(used=len(self.slots.pool.used()), free=self.slots.pool.free())
