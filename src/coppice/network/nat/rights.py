"""The privileges that a process needs to make slots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from coppice.errors import HostCannot
from coppice.linux import nft

_CAP_NET_ADMIN: Final = 12  # linux/capability.h
_CAP_SYS_ADMIN: Final = 21


def require_rights() -> None:
    """Check that this process may make slots.

    :raises HostCannot: a privilege or a device is missing
    """
    if lacking := missing_rights():
        raise HostCannot(
            f"cannot make a network slot: {lacking}",
            hint="run as root (in a container: with CAP_NET_ADMIN, CAP_SYS_ADMIN and /dev/net/tun), or use `--network user`",
        )


def missing_rights() -> str:
    """Return the reason why this process cannot make slots; empty if it can."""
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    for bit, shown in ((_CAP_NET_ADMIN, "CAP_NET_ADMIN"), (_CAP_SYS_ADMIN, "CAP_SYS_ADMIN")):
        if not effective >> bit & 1:
            return f"this process lacks {shown}"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun does not exist"
    if not nft.available():
        return "libnftables is not installed"
    if not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        return "/proc/sys/net is read-only"
    return ""
