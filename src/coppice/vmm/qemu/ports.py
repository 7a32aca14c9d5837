"""Forwarded ports of QEMU's user-mode network. For port 0 the kernel picks a free one."""

from __future__ import annotations

import re

import msgspec

from coppice.errors import VmmError
from coppice.model import ANY_PORT, Publish

# `  TCP[HOST_FORWARD]  11      127.66.7.8 42485       10.0.2.15    80     0     0`; `*` is any
# address.
_UNPRIVILEGED, _LAST = 1024, 65535  # the range that the kernel picks from
_FORWARD = re.compile(r"^\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d{1,5})\s+\S+\s+(\d{1,5})\s", re.MULTILINE)


def with_picked(asked: tuple[Publish, ...], said: str) -> tuple[Publish, ...]:
    """Return the requested ports, with each 0 replaced by the host port in the output of `info
    usernet`.

    The output is not trusted: a guest may control its VMM, and root binds these ports at the next
    start.

    :raises VmmError: a port is missing, or is one that the kernel would not pick
    """
    fixed = {(*_key(port), port.host_port) for port in asked}
    picked: dict[tuple[str, str, int], list[int]] = {}
    for protocol, address, host_port, guest_port in _FORWARD.findall(said):
        key = (protocol.lower(), address, int(guest_port))
        if (*key, int(host_port)) not in fixed and _UNPRIVILEGED <= int(host_port) <= _LAST:
            picked.setdefault(key, []).append(int(host_port))
    try:
        return tuple(
            msgspec.structs.replace(port, host_port=picked[_key(port)].pop()) if port.host_port == ANY_PORT else port
            for port in asked
        )
    except (KeyError, IndexError) as error:
        raise VmmError(
            "QEMU does not report the port that it published",
            hint="publish a fixed port, not `auto`: `--publish 8080:80`",
        ) from error


def _key(port: Publish) -> tuple[str, str, int]:
    return port.protocol, "*" if port.host_address == "0.0.0.0" else port.host_address, port.guest_port  # noqa: S104 - compared
