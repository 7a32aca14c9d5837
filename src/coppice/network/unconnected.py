"""No network: a machine without a NIC. The host reaches it through its agent ports only."""

from __future__ import annotations

from collections.abc import Sequence

from coppice.errors import UsageError
from coppice.model import Egress, Instance, Publish, Traffic
from coppice.model.network import GuestNetwork, Nic
from coppice.network.provider import NetworkProvider


class Unconnected(NetworkProvider):
    """The provider `none`."""

    name = "none"
    backend = None

    def check(self, ports: Sequence[Publish]) -> None:
        if ports:
            raise UsageError(
                "a machine without a network cannot publish ports",
                hint="make the machine with `--network user`; a fork has the network of its source",
            )

    def check_egress(self, policy: Egress) -> None:
        if policy.mode == "allow":
            raise UsageError("a machine without a network reaches nothing", hint="make it with `--network nat`")

    async def attach(self, instance: Instance) -> tuple[Nic, ...]:  # noqa: ARG002
        return ()

    def guest(self, instance: Instance) -> GuestNetwork | None:  # noqa: ARG002
        return None

    async def published(self, instance: Instance) -> tuple[Publish, ...]:
        return instance.publish

    async def traffic(self, instance: Instance) -> Traffic:  # noqa: ARG002
        """Return zeros: there is no NIC."""
        return Traffic(received_bytes=0, sent_bytes=0, counted_by="host")

    async def detach(self, instance_id: str) -> None:
        """Do nothing: nothing is ever attached."""
