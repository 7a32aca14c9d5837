"""The validator of addresses: published ports, egress policies, and servers in guests."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from coppice.errors import UsageError
from coppice.model import ANY_PORT, OWN_ADDRESS, Egress, ProcessSpec, Publish

MAX_PORTS = 128  # per machine: each needs a descriptor of its VMM and space on a command line


def check_publish(ports: Sequence[Publish]) -> tuple[Publish, ...]:
    """Return valid forwarded ports as a tuple.

    They become options of the VMM, so each address must be nothing else.

    :raises UsageError: a port is out of range, an address is invalid, or a port is published twice
    """
    for port in ports:
        if not (
            ANY_PORT <= port.host_port <= 65535 and 1 <= port.guest_port <= 65535 and port.protocol in ("tcp", "udp")
        ):
            raise UsageError(
                f"cannot publish {port.host_port}:{port.guest_port}/{port.protocol}",
                hint="ports are 1 to 65535 (0 on the host's side for any), protocols tcp and udp",
            )
        if port.host_address != OWN_ADDRESS and not _is_address(port.host_address):
            raise UsageError(
                f"{port.host_address!r} is not an IP address of a host", hint="write one such as 127.0.0.1"
            )
    if len(ports) > MAX_PORTS:
        raise UsageError(f"cannot publish {len(ports)} ports of one machine", hint=f"publish {MAX_PORTS} at most")
    holders: dict[tuple[int, str], list[str]] = {}
    for port in ports:
        if port.host_port != ANY_PORT:
            holders.setdefault((port.host_port, port.protocol), []).append(port.host_address)
    for (number, protocol), addresses in holders.items():
        # An unspecified address takes the port on all addresses.
        if len(set(addresses)) < len(addresses) or (len(addresses) > 1 and _EVERY_ADDRESS & set(addresses)):
            raise UsageError(
                f"the host port {number}/{protocol} is published twice", hint="give each its own host port"
            )
    return tuple(ports)


MAX_EGRESS = 256  # networks, and as many names, per policy
_DOMAIN = r"(?:\*\.)?(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"


def check_egress(policy: Egress | None) -> Egress | None:
    """Return a valid policy, or None, unchanged.

    Networks and names become firewall rules, so they must be nothing else.

    :raises UsageError: a network or name is invalid, there are too many, or a policy other than
        `allow` has a list
    """
    if policy is None:
        return None
    if policy.mode != "allow" and (policy.networks or policy.names):
        raise UsageError(f"the policy {policy.mode!r} takes no list", hint="write allow=NETWORK,NAME")
    if max(len(policy.networks), len(policy.names)) > MAX_EGRESS:
        raise UsageError("the policy is too long", hint=f"allow {MAX_EGRESS} networks and {MAX_EGRESS} names at most")
    for network in policy.networks:
        if not _is_network(network):
            raise UsageError(f"{network!r} is not a network", hint="write one such as 192.0.2.0/24 or 2001:db8::/32")
    for name in policy.names:
        if len(name) > 253 or not re.fullmatch(_DOMAIN, name):
            raise UsageError(
                f"{name[:80]!r} is not a domain name",
                hint="write one such as example.org, or *.example.org, in lower case",
            )
    return policy


def _is_network(text: str) -> bool:
    from ipaddress import ip_network

    try:
        return str(ip_network(text)) == text
    except ValueError:
        return False


_EVERY_ADDRESS = {"0.0.0.0", "::"}  # noqa: S104 - compared


def _is_address(text: str) -> bool:
    """Return whether `text` is a host's address in its shortest form, so that different texts are
    different addresses.
    """
    from ipaddress import ip_address

    try:
        address = ip_address(text)
    except ValueError:
        return False
    # The zone of an IPv6 address may be any text.
    return "%" not in text and text == str(address) and not address.is_multicast and text != "255.255.255.255"


def check_publish_many(ports: Sequence[Publish], count: int) -> None:
    """Check that `count` forks can all publish these ports.

    :raises UsageError: they would all use the same port of the host
    """
    if count > 1 and any(port.host_port != ANY_PORT and port.host_address != OWN_ADDRESS for port in ports):
        raise UsageError(
            "several forks cannot publish the same host port",
            hint="give each its own address, as in `own:8080:80`, or any port, as in `auto:80`",
        )


NOBODY = "none"


def check_notify(to: int | str | None) -> int | str | None:
    """Return a valid endpoint for notices of forks unchanged: a port, a unix socket, or `none`.

    :raises UsageError: it is something else
    """
    return to if to is None or to == NOBODY else check_endpoint(to)


def told(process: ProcessSpec, notify: int | str | None) -> ProcessSpec:
    """Return a process with the endpoint of a request. None: it keeps the one that it has."""
    if notify is None:
        return process
    return msgspec.structs.replace(process, notify=None if notify == NOBODY else notify)


def check_endpoint(to: int | str) -> int | str:
    """Return a valid port or unix socket of a guest unchanged.

    :raises UsageError: it is neither a port nor `unix:` and an absolute path or an abstract name
    """
    if isinstance(to, int):
        good = 1 <= to <= 65535
    else:
        kind, _, path = to.partition(":")
        good = kind == "unix" and len(path) > 1 and path[0] in "/@" and "\0" not in path
    if not good:
        raise UsageError(
            f"{to!r:.80} is not a port or a unix socket", hint="write 1 to 65535, unix:/run/app.sock or unix:@name"
        )
    return to
