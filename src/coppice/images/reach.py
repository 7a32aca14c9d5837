"""Which hosts an owner may have the server ask for images: those that the owner could ask itself.

A server is often inside a network that the owners of its tokens are not in. Without this, a pull
from `10.0.0.7:8080` would tell them what listens there.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

from coppice.errors import Forbidden, HostCannot
from coppice.model import Record

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


class PublicHosts(Record, frozen=True):
    """Hosts with public addresses only, and those that are `allowed`: HOST or HOST:PORT."""

    allowed: tuple[str, ...] = ()

    def require(self, host: str) -> None:
        """Blocks until the name is resolved. `host` is HOST or HOST:PORT.

        :raises Forbidden: one of its addresses is not public
        :raises HostCannot: it has no address
        """
        name = _without_port(host)
        if {host, name} & set(self.allowed):
            return
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise HostCannot(f"cannot resolve the host {name}", hint="check its name") from error
        if not all(is_public(ipaddress.ip_address(str(address[0]).partition("%")[0])) for *_, address in found):
            raise Forbidden(
                f"the host {name} has an address that is not public",
                hint=f"ask the operator to pull the image, or to start the server with `--allow-registry {host}`",
            )


def _without_port(host: str) -> str:
    name, _, port = host.partition(":")
    return name if port.isdecimal() else host  # an IPv6 address has more colons


def is_public(address: _Address) -> bool:
    """Return whether an address is of the public internet, also if it is translated to another."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast
