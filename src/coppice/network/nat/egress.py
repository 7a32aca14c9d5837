"""Egress policies as rules of a slot, and the slot's counters of refused packets."""

from __future__ import annotations

import random
from ipaddress import ip_network
from typing import Final

from coppice.linux import nft
from coppice.model import Egress, EgressRefusal, EgressReport
from coppice.network.nat import addresses
from coppice.network.nat.rules import DNS_PORT

# This host, other slots, and link-local addresses, where clouds serve the host's metadata. The
# host's own table, which always has its current addresses, refuses those.
_DENIED4: Final = f"{{ 169.254.0.0/16, {addresses.OUTSIDE4}, 127.0.0.0/8, 224.0.0.0/4, 240.0.0.0/4 }}"
_DENIED6: Final = f"{{ fe80::/10, fd00:ec2::254, {addresses.OUTSIDE6}, ff00::/8 }}"
_EXTRA_S: Final = 60  # for a connection that starts just before its answer expires


def rules(policy: Egress) -> str:
    """Return the ruleset that replaces the policy of a slot, as one transaction.

    Questions to the name server are marked, and so are connections to an address that was allowed
    by its name: they continue after the answer has expired. Each policy uses another mark, so that
    a new policy judges every connection again.
    """
    mark = random.getrandbits(31) | 1
    lines = [f"flush chain inet slot {chain}" for chain in ("egress", "resolver")]
    lines += [f"flush set inet slot {name}" for name in ("networks4", "networks6", "named4", "named6")]
    add, passed = "add rule inet slot egress", "counter name passed accept"
    if policy.mode == "all" or policy.names:
        server = addresses.HOST4 if policy.mode == "all" else f"{addresses.HOST4}:{DNS_PORT}"
        lines.append(f"add rule inet slot resolver meta l4proto {{ tcp, udp }} ct mark set {mark} dnat ip to {server}")
        lines.append(f"{add} ct mark {mark} {passed}")
    if policy.mode != "none":
        lines += [f"{add} ip daddr {_DENIED4} goto refuse", f"{add} ip6 daddr {_DENIED6} goto refuse"]
    if policy.mode == "all":
        lines.append(f"{add} {passed}")
    if policy.mode == "allow":
        for version, address in ((4, "ip"), (6, "ip6")):
            if networks := [each for each in policy.networks if ip_network(each).version == version]:
                lines.append(f"add element inet slot networks{version} {{ {', '.join(networks)} }}")
            lines.append(f"{add} {address} daddr @networks{version} {passed}")
            lines.append(f"{add} {address} daddr @named{version} ct mark set {mark} {passed}")
    lines.append(f"{add} goto refuse")
    return "\n".join(lines) + "\n"


def may_resolve(policy: Egress, name: str) -> bool:
    """Return whether a guest may resolve a name, which is in lower case without the final dot."""
    if policy.mode == "all":
        return True
    return policy.mode == "allow" and any(
        name.endswith(each[1:]) if each.startswith("*.") else name == each for each in policy.names
    )


def admit(found: dict[str, int]) -> str:
    """Return the ruleset that allows a slot to reach each address for the given number of
    seconds.
    """
    lines = []
    for address, seconds in found.items():
        version = ip_network(address).version
        # Delete first: an existing element would keep its timeout.
        element = f"inet slot named{version} {{ {address}"
        lines += [f"add element {element} }}", f"delete element {element} }}"]
        lines.append(f"add element {element} timeout {seconds + _EXTRA_S}s }}")
    return "\n".join(lines) + "\n"


def report(policy: Egress, refused_names: dict[str, int]) -> EgressReport:
    """Return what the slot of the caller's namespace has passed and refused. Blocks."""
    counters = {
        each["counter"]["name"]: each["counter"]
        for each in nft.read("list counters table inet slot")
        if "counter" in each
    }
    refusals = [EgressRefusal(what=name, count=count) for name, count in refused_names.items()]
    for version in (4, 6):
        for listed in nft.read(f"list set inet slot refused{version}"):
            for element in listed.get("set", {}).get("elem", []):
                address, protocol, port = element["elem"]["val"]["concat"]
                shown = f"[{address}]" if version == 6 else address
                refusals.append(
                    EgressRefusal(what=f"{shown}:{port}/{protocol}", count=element["elem"]["counter"]["packets"])
                )
    return EgressReport(
        policy=policy,
        passed_packets=counters["passed"]["packets"],
        refused_packets=counters["refused"]["packets"],
        refused=tuple(sorted(refusals, key=lambda each: -each.count)),
    )
