"""The provider `passt`: a passt(1) process next to each VMM, which needs no root.

passt translates between the frames of the guest and sockets of the user who started it. It has one
end of a socket pair, the VMM the other, and it ends when the VMM does. So there is nothing on the
host to find again or to remove.

Inside, all guests have the same addresses, and passt has the same MAC for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from coppice.errors import UsageError
from coppice.model import ANY_PORT, Instance, Publish
from coppice.model.network import GuestNetwork, Nic, NicBackend
from coppice.network.listening import ListeningNetwork
from coppice.network.mac import mac_address

_ADDRESS: Final = "10.0.2.15"
_PREFIX: Final = 24
_GATEWAY: Final = "10.0.2.2"
_DNS: Final = "10.0.2.3"
_ADDRESS6: Final = "fdc0:bb1c:e001::2"
_PREFIX6: Final = 126
_GATEWAY6: Final = "fdc0:bb1c:e001::1"
_MAC: Final = "02:c0:bb:1c:e0:01"  # of passt; a fork's neighbour table has it already
_RARP: Final = b"\x80\x35"  # an EtherType
_MTU: Final = 65520
_ROUTES6: Final = Path("/proc/net/ipv6_route")


class PasstNetwork(ListeningNetwork):
    """The provider `passt`."""

    name = "passt"
    backend = NicBackend.STREAM

    def missing(self) -> str:
        return "" if shutil.which("passt") else "passt is not installed"

    def check(self, ports: Sequence[Publish]) -> None:
        guest_ports: dict[tuple[str, int], int] = {}
        for port in ports:
            known = guest_ports.setdefault((port.protocol, port.host_port), port.guest_port)
            if port.host_port != ANY_PORT and known != port.guest_port:
                raise UsageError(
                    f"passt cannot forward port {port.host_port} to both {known} and {port.guest_port} of the guest",
                    hint="publish different ports of this host, or use `--network nat`",
                )

    def nic(self, instance: Instance, forwards: tuple[Publish, ...]) -> Nic:
        mac = mac_address(instance.id)
        return Nic(backend=self.backend, mac=mac, helper=_command(forwards), greeting=_greeting(mac))

    def guest(self, instance: Instance) -> GuestNetwork:
        routed6 = _has_route6()
        return GuestNetwork(
            mac=mac_address(instance.id),
            address=f"{_ADDRESS}/{_PREFIX}",
            gateway=_GATEWAY,
            dns=(_DNS,),
            mtu=_MTU,
            address6=f"{_ADDRESS6}/{_PREFIX6}" if routed6 else None,
            gateway6=_GATEWAY6 if routed6 else None,
        )


def _command(forwards: Sequence[Publish]) -> tuple[str, ...]:
    """Return the command of one guest's passt. It returns when passt serves in the background."""
    return (
        "passt",
        *("--quiet", "--address", _ADDRESS, "--netmask", str(_PREFIX), "--gateway", _GATEWAY),
        *("--address", _ADDRESS6, "--gateway", _GATEWAY6, "--dns-forward", _DNS),
        *("--mac-addr", _MAC, "--mtu", str(_MTU)),
        # The guest gets its settings from its agent. Its gateway is not this host's loopback.
        *("--no-dhcp", "--no-dhcpv6", "--no-ra", "--no-map-gw"),
        *(
            word
            for port in forwards
            for word in (
                "--udp-ports" if port.protocol == "udp" else "--tcp-ports",
                f"{port.host_address}/{port.host_port}:{port.guest_port}",
            )
        ),
        "--fd",
    )


def _greeting(mac: str) -> bytes:
    """Return a frame from the guest's MAC.

    passt learns the MAC from a guest's first frame, and reaches no guest before. A restored guest
    may wait for connections and send nothing. The frame has a protocol that passt ignores.
    """
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) + _RARP + bytes(46)


def _has_route6() -> bool:
    """Whether this host has a default route for IPv6. Without one passt has no IPv6 either."""
    lines = _ROUTES6.read_text().splitlines() if _ROUTES6.exists() else []
    return any(words[:2] == ["0" * 32, "00"] and words[-1] != "lo" for words in map(str.split, lines))
