"""The nftables rulesets: one table of this host per data directory, and one table in each slot."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

from coppice.model import Publish
from coppice.network.nat import addresses
from coppice.network.nat.addresses import TAP, WAN, Slot

_EVERY: Final = {"0.0.0.0": 4, "::": 6}  # noqa: S104 - compared
DNS_PORT: Final = 5353  # of `HOST4`, as slots see the filter of names
_DNS_PORTS: Final = range(20000, 32768)  # below those that the kernel gives to any program
_NEIGHBOURS: Final = "{ nd-neighbor-solicit, nd-neighbor-advert }"


def table(key: str) -> str:
    """Return the name of this host's table."""
    return f"coppice_{key}"


def dns_port(key: str) -> int:
    """The port of `HOST4` at which the filter of names of a data directory listens.

    `HOST4` is the same address for all data directories.
    """
    return _DNS_PORTS[int(key, 16) % len(_DNS_PORTS)]


def host(key: str) -> str:
    """Return this host's table. The kernel refuses it if it already exists.

    A slot reaches the outside world, but no address of this host and no other slot. Only
    connections to published ports reach a slot. Forwarding a port of 127.0.0.1 needs
    `route_localnet` on the links; the drop of 127.0.0.0/8 makes up for that setting.

    Only a connection's first packet leads it to a slot. The kernel may begin to track connections
    with this table, and then takes the next packet of an older one for its first. Such a connection
    may be one that woke the machine.
    """
    links = f'"{addresses.prefix(key)}*"'
    name = f"inet {table(key)}"
    forward = "    tcp flags & (syn | ack) != syn return\n" + "\n".join(
        f"    meta l4proto {{ tcp, udp }} fib daddr type local dnat {family} to {lookup}"
        for family, proto, version in (("ip", "ip", 4), ("ip6", "ip6", 6))
        for lookup in (
            f"meta l4proto . {proto} daddr . th dport map @published{version}",
            f"meta l4proto . th dport map @published{version}_every",
        )
    )
    address = {4: "ipv4_addr", 6: "ipv6_addr"}
    maps = "\n".join(
        f"  map published{version} {{\n"
        f"    type inet_proto . {address[version]} . inet_service : {address[version]} . inet_service\n  }}\n"
        f"  map published{version}_every {{\n"
        f"    type inet_proto . inet_service : {address[version]} . inet_service\n  }}"
        for version in (4, 6)
    )
    return f"""\
create table {name}
table {name} {{
{maps}
  chain loopback {{
    type filter hook prerouting priority raw; policy accept;
    iifname {links} ip daddr 127.0.0.0/8 drop
  }}
  chain resolver {{
  }}
  chain arriving {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname {links} ip daddr {addresses.HOST4} meta l4proto {{ tcp, udp }} th dport 53 jump resolver
    iifname {links} ip daddr {addresses.HOST4} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} {_filter(key)}
    iifname {links} return
{forward}
  }}
  chain local {{
    type nat hook output priority -100; policy accept;
{forward}
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    iifname {links} oifname != {links} masquerade
    oifname {links} fib saddr type local masquerade
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname {links} oifname {links} drop
    oifname {links} ct state established,related accept
    oifname {links} ct status dnat accept
    oifname {links} drop
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname {links} ct state established,related accept
    iifname {links} icmpv6 type {_NEIGHBOURS} accept
    iifname {links} meta l4proto {{ tcp, udp }} th dport {dns_port(key)} ip daddr {addresses.HOST4} accept
    iifname {links} counter reject with icmpx admin-prohibited
  }}
}}
"""


def resolver(key: str, upstream: str | None) -> str:
    """Return the rules that direct the DNS questions of all slots to a name server.

    If `upstream` is None, the filter of names answers, by asking this host's resolver.
    """
    chain = f"inet {table(key)} resolver"
    to = f"dnat ip to {upstream}" if upstream else _filter(key)
    return f"flush chain {chain}\nadd rule {chain} meta l4proto {{ tcp, udp }} {to}\n"


def _filter(key: str) -> str:
    return f"dnat ip to {addresses.HOST4}:{dns_port(key)}"


def published(key: str, slot: Slot, ports: Iterable[Publish], *, verb: str) -> str:
    """Return the rules that forward host ports to a slot (`create`), or stop forwarding (`delete`).

    `create` fails if another slot has one of the ports.
    """
    lines = []
    for port in ports:
        version = _EVERY.get(port.host_address) or ip_address(port.host_address).version
        every = port.host_address in _EVERY
        found = f"{port.protocol} . {'' if every else f'{port.host_address} . '}{port.host_port}"
        to = f"{slot.address4 if version == 4 else slot.address6} . {port.guest_port}"
        lines.append(
            f"{verb} element inet {table(key)} published{version}{'_every' if every else ''} {{ {found} : {to} }}\n"
        )
    return "".join(lines)


def slot(own: Slot) -> str:
    """Return the table of a slot whose guest reaches nothing; `coppice.network.nat.egress` adds
    what it may reach.

    Replies of published ports pass under any policy. Every packet of a connection that the guest
    starts is checked against the policy, so a new policy also ends established connections.
    """
    return f"""\
table inet slot {{
  counter passed {{
  }}
  counter refused {{
  }}
  set refused4 {{
    type ipv4_addr . inet_proto . inet_service
    size 1024
    flags dynamic,timeout
    counter
    timeout 1h
  }}
  set refused6 {{
    type ipv6_addr . inet_proto . inet_service
    size 1024
    flags dynamic,timeout
    counter
    timeout 1h
  }}
  set networks4 {{
    type ipv4_addr
    flags interval
  }}
  set networks6 {{
    type ipv6_addr
    flags interval
  }}
  set named4 {{
    type ipv4_addr
    flags timeout
    size 65536
  }}
  set named6 {{
    type ipv6_addr
    flags timeout
    size 65536
  }}
  chain resolver {{
  }}
  chain arriving {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{WAN}" meta nfproto ipv4 dnat ip to {addresses.GUEST4}
    iifname "{WAN}" ip6 daddr {own.address6} dnat ip6 to {addresses.GUEST6}
    iifname "{TAP}" ip daddr {addresses.GATEWAY4} meta l4proto {{ tcp, udp }} th dport 53 jump resolver
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{WAN}" meta nfproto ipv4 snat ip to {own.address4}
    oifname "{WAN}" meta nfproto ipv6 snat ip6 to {own.address6}
  }}
  chain refuse {{
    counter name refused
    meta l4proto {{ tcp, udp }} update @refused4 {{ ip daddr . meta l4proto . th dport }}
    meta l4proto {{ tcp, udp }} update @refused6 {{ ip6 daddr . meta l4proto . th dport }}
    reject with icmpx admin-prohibited
  }}
  chain egress {{
    goto refuse
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{WAN}" accept
    iifname "{TAP}" ct direction reply accept
    iifname "{TAP}" ct state related accept
    iifname "{TAP}" goto egress
  }}
}}
"""
