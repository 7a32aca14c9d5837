"""One slot in the kernel, made by netlink (pyroute2) in the namespaces that it connects.

All functions block.

pyroute2 is imported in the functions that use it. The import takes 0.2 s, and neither a fork nor a
command that lists machines needs it. pyroute2 has its own event loop, so it works in threads
without one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from coppice.linux import netns, nft, tap
from coppice.model import Egress
from coppice.network.nat import addresses, egress, rules
from coppice.network.nat.addresses import TAP, TAP_MAC, WAN, Slot

_SYSCTL: Final = Path("/proc/sys/net")


class Taken(Exception):
    """Another data directory has a slot with this number."""


def create(slot: Slot, host: Path | None, mtu: int) -> None:
    """Make a slot whose guest can reach nothing yet.

    After a failure, `remove` removes the partial slot.

    :raises Taken: another data directory has one with its number
    :raises OSError: the kernel refused
    """
    with _kernel_errors():
        descriptor = os.open(host or "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            netns.create(slot.namespace, lambda: _inside(slot, descriptor, mtu))
        finally:
            os.close(descriptor)
        netns.apart(host, lambda: _outside(slot))


def remove(slots: Sequence[Slot], host: Path | None) -> None:
    """Remove slots, including partial ones. Idempotent.

    Their links are deleted as one group, so that the kernel waits once for concurrent readers, not
    once per link.

    :raises OSError: the kernel refused
    """

    def links() -> None:
        found = False
        for slot in slots:
            with contextlib.suppress(OSError):  # it does not exist
                index = socket.if_nametoindex(slot.link)
                _request(_RTM_SETLINK, 0, _about_link(index, _group(slot.key)))
                found = True
        if found:
            _request(_RTM_DELLINK, 0, _about_link(0, _group(slots[0].key)))

    # Links first: namespaces are removed asynchronously, and a link that still exists would occupy
    # its name.
    netns.inside(host, links)
    for slot in slots:
        netns.remove(slot.namespace)


def _about_link(index: int, group: int) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, 0, 0) + _attribute(_IFLA_GROUP, struct.pack("=I", group))


def _group(key: str) -> int:
    """Return the group number that a data directory's links get for their removal."""
    return 1 << 30 | int(key, 16)


def _inside(slot: Slot, host: int, mtu: int) -> None:
    from pyroute2 import IPRoute

    tap.create(TAP)
    write("ipv4/ip_forward", "1")
    has6 = has_ipv6()
    if has6:
        write("ipv6/conf/all/forwarding", "1")
        write("ipv6/conf/default/accept_dad", "0")  # no other host can have its addresses
        for name in ("all", TAP):
            write(f"ipv6/conf/{name}/accept_dad", "0")
        # The guest sees no address but the gateway's. The veth pair keeps link-local addresses:
        # neighbour solicitations for forwarded packets come from them.
        write(f"ipv6/conf/{TAP}/addr_gen_mode", "1")
    with IPRoute() as kernel:
        kernel.link("set", index=1, state="up")
        card = socket.if_nametoindex(TAP)
        kernel.link("set", index=card, address=TAP_MAC, mtu=mtu, state="up")
        kernel.link("add", ifname=WAN, kind="veth", mtu=mtu, peer={"ifname": slot.link, "mtu": mtu, "net_ns_fd": host})
        wan = socket.if_nametoindex(WAN)
        kernel.link("set", index=wan, state="up")
        kernel.addr("add", index=card, address=str(addresses.GATEWAY4), prefixlen=addresses.INSIDE4.prefixlen)
        kernel.addr("add", index=wan, address=str(slot.address4), prefixlen=32)
        # This host is on the link, and is the next hop for everything else.
        kernel.route("add", dst=f"{addresses.HOST4}/32", oif=wan, scope=253)
        kernel.route("add", dst="default", gateway=str(addresses.HOST4), oif=wan)
        if has6:
            kernel.addr("add", index=card, address=str(addresses.GATEWAY6), prefixlen=addresses.INSIDE6.prefixlen)
            kernel.addr("add", index=wan, address=str(slot.address6), prefixlen=128)
            kernel.route("add", family=socket.AF_INET6, dst=f"{addresses.HOST6}/128", oif=wan)
            kernel.route("add", family=socket.AF_INET6, dst="default", gateway=str(addresses.HOST6), oif=wan)
    nft.apply(rules.slot(slot) + egress.rules(Egress()))


def _outside(slot: Slot) -> None:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    has6 = has_ipv6()
    write(f"ipv4/conf/{slot.link}/route_localnet", "1")
    write(f"ipv4/conf/{slot.link}/rp_filter", "1")  # a slot sends from its own address
    if has6:
        write(f"ipv6/conf/{slot.link}/accept_dad", "0")
        write(f"ipv6/conf/{slot.link}/accept_ra", "0")
    with IPRoute() as kernel:
        link = socket.if_nametoindex(slot.link)
        kernel.link("set", index=link, state="up")
        kernel.addr("add", index=link, address=str(addresses.HOST4), prefixlen=32)
        try:
            # The exclusive route tells other data directories that the number is taken.
            kernel.route("add", dst=f"{slot.address4}/32", oif=link, scope=253)
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                raise Taken(slot.number) from error
            raise
        if has6:
            kernel.addr("add", index=link, address=str(addresses.HOST6), prefixlen=128)
            kernel.route("add", family=socket.AF_INET6, dst=f"{slot.address6}/128", oif=link)


def uplink_mtu() -> int:
    """Return the MTU of the default route in the caller's namespace.

    Larger packets could not leave this host.
    """
    from pyroute2 import IPRoute

    found = []
    with IPRoute() as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in kernel.get_default_routes(family=family):
                if index := route.get("oif"):
                    found += [link.get("mtu") for link in kernel.get_links(index)]
    return max(1280, min(found, default=1500))


def set_neighbours(mac: str) -> None:
    """Set the guest's MAC in the caller's namespace, a slot, so that no neighbour lookup or stale
    entry is used.
    """
    card = socket.if_nametoindex(TAP)
    for address in (addresses.GUEST4.packed, *([addresses.GUEST6.packed] if has_ipv6() else [])):
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        body = struct.pack("=BxxxiHBB", family, card, _NUD_PERMANENT, 0, 0)
        body += _attribute(_NDA_DST, address) + _attribute(_NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
        _request(_RTM_NEWNEIGH, _CREATE | _REPLACE, body)


# Implemented here for forks and removals: importing pyroute2 takes longer than all of their work.
_RTM_DELLINK: Final = 17
_RTM_SETLINK: Final = 19
_IFLA_GROUP: Final = 27
_RTM_NEWNEIGH: Final = 28
_NUD_PERMANENT: Final = 0x80
_NDA_DST, _NDA_LLADDR = 1, 2
_REQUEST, _ACK, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400


def _request(kind: int, flags: int, body: bytes) -> None:
    """Send a request of rtnetlink(7), and wait for the kernel's answer.

    :raises OSError: the kernel refused
    """
    header = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.send(header + body)
        (status,) = struct.unpack_from("=i", kernel.recv(4096), 16)
    if status:
        raise OSError(-status, os.strerror(-status))


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def has_ipv6() -> bool:
    """Return whether the kernel has IPv6."""
    return (_SYSCTL / "ipv6").exists()


def read(name: str) -> str:
    """Return a setting of the caller's namespace."""
    return (_SYSCTL / name).read_text().strip()


def write(name: str, value: str) -> None:
    """Change a setting of the caller's namespace."""
    (_SYSCTL / name).write_text(value)


@contextlib.contextmanager
def _kernel_errors() -> Iterator[Any]:
    """Turn errors of netlink and nftables into OSError."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error
    except nft.Refused as error:
        raise OSError(errno.EINVAL, f"nftables: {error}") from error


def forwarding_changes() -> dict[str, tuple[str, str]]:
    """Return the changes that let the caller's namespace forward packets: the current and the
    required value of each setting.
    """
    changes = {}
    if read("ipv4/ip_forward") == "0":
        changes["ipv4/ip_forward"] = ("0", "1")
    if has_ipv6() and read("ipv6/conf/all/forwarding") == "0":
        # A host that forwards ignores routes in router advertisements, unless accept_ra is 2.
        for path in sorted((_SYSCTL / "ipv6/conf").glob("*/accept_ra")):
            name = path.parent.name
            if name not in ("all", "default", "lo") and path.read_text().strip() == "1":
                changes[f"ipv6/conf/{name}/accept_ra"] = ("1", "2")
        changes["ipv6/conf/all/forwarding"] = ("0", "1")
    return changes


def change(changes: dict[str, tuple[str, str]], *, undo: bool = False) -> None:
    """Apply or undo changes from `forwarding_changes`. Skip interfaces that no longer exist."""
    for name, (before, after) in reversed(changes.items()) if undo else changes.items():
        with contextlib.suppress(FileNotFoundError):
            write(name, before if undo else after)
