"""The addresses and names of slots.

198.18.0.0/15 is reserved for benchmarks of network devices (RFC 2544), so hardly any site routes
it. Inside, all slots have the same addresses. Outside, a slot's number determines its address.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Final

from coppice.linux import netns
from coppice.model import Record

INSIDE4: Final = IPv4Network("198.19.255.252/30")
INSIDE6: Final = IPv6Network("fdc0:bb1c:e001::/126")
GATEWAY4, GUEST4 = INSIDE4[1], INSIDE4[2]
GATEWAY6, GUEST6 = INSIDE6[1], INSIDE6[2]
OUTSIDE4: Final = IPv4Network("198.18.0.0/16")
OUTSIDE6: Final = IPv6Network("fdc0:bb1c:e000::/112")
HOST4, HOST6 = OUTSIDE4[1], OUTSIDE6[1]  # this host, as every slot sees it
NUMBERS: Final = range(16, 65000)

TAP: Final = "tap0"
WAN: Final = "wan"  # the slot's end of its veth pair
# The same in every slot, so that a fork's entry for its gateway stays valid.
TAP_MAC: Final = "02:c0:bb:1c:e0:01"


class Slot(Record, frozen=True):
    """One slot by its number. The slot need not exist."""

    key: str
    number: int

    @property
    def namespace(self) -> Path:
        """The mount that keeps its network namespace alive; `ip netns` lists it."""
        return netns.RUNTIME / self.link

    @property
    def link(self) -> str:
        """The name of its namespace, and of this host's end of its veth pair."""
        return f"{prefix(self.key)}{self.number}"

    @property
    def address4(self) -> IPv4Address:
        return OUTSIDE4[self.number]

    @property
    def address6(self) -> IPv6Address:
        return OUTSIDE6[self.number]


def prefix(key: str) -> str:
    """Return the prefix of the names of a data directory's links and namespaces."""
    return f"cp{key}-"
