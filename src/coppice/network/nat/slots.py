"""The provider `nat`'s operations on the slots of one data directory. All methods block."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from coppice.errors import CoppiceError, HostCannot, InUse
from coppice.linux import netns, nft, tap
from coppice.model import ANY_PORT, EgressReport, Instance, Publish, Traffic
from coppice.network.mac import mac_address
from coppice.network.nat import is_wanted, link, refill
from coppice.network.nat.addresses import TAP, Slot
from coppice.network.nat.conntrack import count_inbound
from coppice.network.nat.pool import Pool
from coppice.network.nat.rights import require_rights
from coppice.network.ports import pick, require_free

_log = logging.getLogger(__name__)
_PICKS: Final = 64


class Slots:
    """Operations on slots during the life of instances."""

    def __init__(self, pool: Pool, database: Path) -> None:
        self.pool = pool
        self._database = database

    def attach(self, instance: Instance) -> Slot:
        """Give an instance a slot with the policy, published ports and guest MAC of its record.

        :raises InUse: another program, or another instance, uses a port that it publishes
        :raises HostCannot: no slot is free, and none can be made
        """
        with _host_errors(f"attach the network of {instance.name}"):
            slot = self.pool.find(instance.id) or self.pool.claim(instance.id)
            if slot is None:
                require_rights()
                slot = self.pool.make(instance.id)
            netns.inside(slot.namespace, lambda: link.set_neighbours(mac_address(instance.id)))
            self.pool.permit(slot, instance.egress)
            if fixed := [port for port in instance.publish if port.host_port != ANY_PORT]:
                self.pool.unpublish(slot)
                netns.inside(self.pool.host, lambda: require_free(instance))
                self._publish(instance, slot, fixed)
        try:
            refill.request(self.pool)
        except OSError as error:  # a fork that finds no slot makes its own and reports errors
            _log.warning("cannot make network slots in advance: %s", error)
        return slot

    def pick_ports(self, instance: Instance) -> tuple[Publish, ...]:
        """Pick and publish the `auto` ports of an attached instance; return all its ports."""
        slot = self.pool.find(instance.id)
        if slot is None:
            raise AssertionError("ports are picked after the network was attached")
        with _host_errors(f"publish the ports of {instance.name}"):
            return tuple(
                self._publish_any(instance, slot, port) if port.host_port == ANY_PORT else port
                for port in instance.publish
            )

    def _publish_any(self, instance: Instance, slot: Slot, port: Publish) -> Publish:
        for _ in range(_PICKS):
            with netns.inside(self.pool.host, lambda: pick(port, self._database)) as held:
                picked = msgspec.structs.replace(port, host_port=held.getsockname()[1])
            with contextlib.suppress(InUse):
                self._publish(instance, slot, [picked])
                return picked
        raise HostCannot("no port of this host is free", hint="publish a port number of your choice instead of `auto`")

    def _publish(self, instance: Instance, slot: Slot, ports: list[Publish]) -> None:
        try:
            self.pool.publish(slot, ports)
        except nft.Refused as error:
            shown = ", ".join(f"{port.host_address}:{port.host_port}/{port.protocol}" for port in ports)
            raise InUse(
                f"{instance.name} cannot publish {shown}: another instance uses it",
                hint="stop the other one, or make a fork that publishes another port, such as `auto:PORT`",
            ) from error

    def detach(self, instance_id: str) -> None:
        """Remove the slot of an instance.

        With the last one, if no other record has this network, also remove the free slots.
        """
        with _host_errors(f"detach the network of {instance_id}"):
            self.pool.release(instance_id)
            if not self.pool.used():
                self.pool.tidy(keep=is_wanted(self._database, instance_id))

    def leftovers(self, known: Callable[[], set[str]]) -> set[str]:
        """Remove the partial slots of killed processes and restart the filter of names.

        Return the ids that have a slot and are not `known`.
        """
        used = self.pool.used()
        try:
            with _host_errors("remove leftover network slots"):
                self.pool.tidy(keep=bool(used) or is_wanted(self._database))
                self.pool.revive_names()
        except CoppiceError as error:
            _log.warning("%s", error)
        return used - known()

    def permit(self, instance: Instance) -> None:
        """Apply the policy of an instance's record to its slot, from the guest's next packet on."""
        slot = self.pool.find(instance.id)
        if slot is not None:
            with _host_errors(f"change the egress policy of {instance.name}"):
                self.pool.permit(slot, instance.egress)

    def connections(self, instance: Instance) -> int:
        """Return how many TCP connections the guest of an instance has accepted and not closed."""
        slot = self.pool.find(instance.id)
        if slot is None:
            return 0
        with _host_errors(f"count the connections of {instance.name}"):
            return netns.apart(slot.namespace, lambda: count_inbound(slot))

    def traffic(self, instance: Instance) -> Traffic | None:
        """Return what the TAP of an instance's slot has passed; None without a slot."""
        slot = self.pool.find(instance.id)
        if slot is None:
            return None
        with _host_errors(f"count the traffic of {instance.name}"):
            sent, received = netns.inside(slot.namespace, lambda: tap.counters(TAP))
        return Traffic(received_bytes=received, sent_bytes=sent, counted_by="host")

    def egress(self, instance: Instance) -> EgressReport:
        """Return what the slot of an instance has passed and refused."""
        slot = self.pool.find(instance.id)
        if slot is None:
            return EgressReport(policy=instance.egress)
        with _host_errors(f"read the refusal counters of {instance.name}"):
            return self.pool.egress(slot, instance.egress)


@contextlib.contextmanager
def _host_errors(action: str) -> Iterator[None]:
    try:
        yield
    except (OSError, nft.Refused) as error:
        raise HostCannot(f"cannot {action}: {error}", hint="check this host with `coppice doctor`") from error
