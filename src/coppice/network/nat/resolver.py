"""The name servers for guests: this host's own, from the current /etc/resolv.conf."""

from __future__ import annotations

import contextlib
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Final

RESOLV_CONF: Final = Path("/etc/resolv.conf")


def servers(file: Path = RESOLV_CONF) -> list[str]:
    """Return the name servers of this host, in order. Blocks."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        words = [line.split() for line in file.read_text().splitlines()]
        return [each[1] for each in words if len(each) > 1 and each[0] == "nameserver" and _is_address(each[1])]
    return []


def reachable_by_slots(found: list[str]) -> str | None:
    """Return the first server that packets can be forwarded to: an IPv4 address of another machine.

    Blocks.

    Slots cannot reach a server on this host itself, such as systemd-resolved's 127.0.0.53.
    """
    return next((each for each in found if ip_address(each).version == 4 and not _is_local(each)), None)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_local(address: str) -> bool:
    """Return whether an address belongs to the caller's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True
