"""Checks of networks: the default of new machines; for slots (`--network nat`) rights, TUN,
nftables, forwarding, unused addresses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coppice.errors import HostCannot, UsageError
from coppice.linux import nft
from coppice.model import Check
from coppice.network import PREFERRED, standard
from coppice.network.nat import addresses, surroundings
from coppice.network.nat.rights import missing_rights
from coppice.vmm.registry import Drivers


def slots() -> Check:
    """Check whether this process may make network slots."""
    return judge_slots(missing_rights())


def judge_slots(lacking: str) -> Check:
    """Judge what is missing for network slots, which only `--network nat` needs."""
    if lacking:
        cure = "run as root; in a container: docker run --cap-add NET_ADMIN --cap-add SYS_ADMIN --device /dev/net/tun"
        if "libnftables" in lacking:
            cure = "apt-get install libnftables1"
        return Check(name="network slots", status="warn", detail=f"no --network nat: {lacking}", cure=cure)
    return Check(name="network slots", status="ok", detail="TUN, nftables and the rights for them are available")


def forwarding() -> Check:
    """Check whether this host forwards packets of slots."""
    if os.geteuid() != 0 or not nft.available():
        return Check(name="forwarding", status="ok", detail="not needed without network slots")
    on = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
    return judge_forwarding(on=on, listed=nft.read("list chains"))


def judge_forwarding(*, on: bool, listed: Iterable[dict[str, Any]]) -> Check:
    """Warn about a firewall that drops forwarded packets."""
    if chain := surroundings.dropping_chain(listed):
        return Check(
            name="forwarding",
            status="warn",
            detail=f"the chain {chain} drops what no rule accepts: guests with --network nat may reach nothing, "
            "so nat is not the default",
            cure=f"nft insert rule {chain} ip saddr {addresses.OUTSIDE4} accept; "
            f"nft insert rule {chain} ip daddr {addresses.OUTSIDE4} accept; export COPPICE_NETWORK=nat",
        )
    return Check(
        name="forwarding", status="ok", detail="on" if on else "off; switched on while there are network slots"
    )


def slot_addresses() -> Check:
    """Check whether this host routes the addresses of slots to another network."""
    return judge_addresses(surroundings.routes())


def judge_addresses(routes: Iterable[surroundings.Route]) -> Check:
    """Warn about a route to the addresses of slots."""
    if found := surroundings.overlap(routes):
        cure = "give that network other addresses, or use --network user"
        return Check(name="slot addresses", status="warn", detail=found, cure=cure)
    return Check(name="slot addresses", status="ok", detail=", ".join(map(str, surroundings.OURS)))


def default_network(home: Path, drivers: Drivers) -> Check:
    """Check which network new machines get, by driver."""
    networks = standard(home)
    found = []
    try:
        for driver in drivers:
            try:
                found.append(f"{driver.name}: {networks.choose(None, driver.capabilities.nic_backends)}")
            except HostCannot:
                found.append(f"{driver.name}: none, so `--network none` is required")
    except UsageError as error:
        cure = f"unset {PREFERRED}, or {error.hint}"
        return Check(name="default network", status="fail", detail=f"{PREFERRED}: {error}", cure=cure)
    return Check(name="default network", status="ok", detail="; ".join(found))
