"""User-mode networks: each VMM has its own TCP/IP stack and listens on the host ports that its
guest publishes.

All guests have the same address, the default of QEMU's `-netdev user`: each is alone on its
network, so the addresses never conflict.
"""

from __future__ import annotations

from collections.abc import Sequence

from coppice.errors import UsageError
from coppice.model import Instance, Publish
from coppice.model.network import GuestNetwork, Nic, NicBackend
from coppice.network.listening import ListeningNetwork
from coppice.network.mac import mac_address

_ADDRESS = "10.0.2.15/24"
_GATEWAY = "10.0.2.2"
_DNS = ("10.0.2.3",)


class UserNetwork(ListeningNetwork):
    """The provider `user`."""

    name = "user"
    backend = NicBackend.USER_MODE

    def check(self, ports: Sequence[Publish]) -> None:
        for port in ports:
            if ":" in port.host_address:  # no release of QEMU parses such an address in hostfwd=
                raise UsageError(
                    f"a user-mode network cannot publish a port of the IPv6 address {port.host_address}",
                    hint="publish it on 127.0.0.1, on `own`, or on 0.0.0.0 for every IPv4 address of this host",
                )

    def nic(self, instance: Instance, forwards: tuple[Publish, ...]) -> Nic:
        return Nic(backend=self.backend, mac=mac_address(instance.id), forwards=forwards)

    def guest(self, instance: Instance) -> GuestNetwork:
        return GuestNetwork(mac=mac_address(instance.id), address=_ADDRESS, gateway=_GATEWAY, dns=_DNS)
