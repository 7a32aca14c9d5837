"""What of this host keeps packets from slots: a firewall, or a network with their addresses."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Final

from coppice.linux import nft
from coppice.network.nat import addresses

OURS: Final = (addresses.OUTSIDE4, addresses.INSIDE4, addresses.OUTSIDE6, addresses.INSIDE6)
_SLOT_LINKS: Final = "cp"
Route = tuple[str, IPv4Network | IPv6Network]


def hindrance() -> str:
    """Return what keeps packets from slots; empty if nothing is found. Blocks.

    Prerequisite: the rights to read the ruleset. The rules of iptables-legacy are not in it.
    """
    try:
        chain = dropping_chain(nft.read("list chains"))
    except nft.Refused as error:
        return f"nftables: {error}"
    if chain:
        return f"the chain {chain} drops what no rule accepts"
    return overlap(routes())


def dropping_chain(listed: Iterable[dict[str, Any]]) -> str:
    """Return a chain that drops forwarded packets, which no table of Coppice can override."""
    for chain in (each["chain"] for each in listed if "chain" in each):
        if chain.get("hook") == "forward" and chain.get("policy") == "drop" and chain["family"] in ("ip", "inet"):
            return f"{chain['family']} {chain['table']} {chain['name']}"
    return ""


def overlap(found: Iterable[Route]) -> str:
    """Return which route has addresses of slots: guests, or even this host, cannot reach that
    network.
    """
    for link, network in found:
        if link.startswith(_SLOT_LINKS) or not network.prefixlen:
            continue
        for own in OURS:
            if own.version == network.version and own.overlaps(network):
                return f"{link} leads to {network}, and {own} belongs to the slots of --network nat"
    return ""


def routes() -> list[Route]:
    """Return the routes of this host. Blocks."""
    found = list(parse_routes(Path("/proc/net/route").read_text().splitlines()))
    six = Path("/proc/net/ipv6_route")
    if six.exists():
        found += parse_routes6(six.read_text().splitlines())
    return found


def parse_routes(lines: Iterable[str]) -> Iterable[Route]:
    """Yield the routes in /proc/net/route, whose numbers have this machine's byte order."""
    for words in (line.split() for line in lines):
        if len(words) > 7 and words[0] != "Iface":
            address, mask = (IPv4Address(struct.pack("=I", int(words[at], 16))) for at in (1, 7))
            yield words[0], IPv4Network(f"{address}/{mask}")


def parse_routes6(lines: Iterable[str]) -> Iterable[Route]:
    """Yield the routes in /proc/net/ipv6_route."""
    for words in (line.split() for line in lines):
        if len(words) > 9:
            text = ":".join(words[0][at : at + 4] for at in range(0, 32, 4))
            network = ip_network(f"{text}/{int(words[1], 16)}")
            if isinstance(network, IPv6Network) and not network.is_link_local and not network.is_multicast:
                yield words[9], network
