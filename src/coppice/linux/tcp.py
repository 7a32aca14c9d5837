"""TCP connections of this network namespace, from /proc/net/tcp (proc_net_tcp(5))."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_OPEN: Final = frozenset({"01", "02", "03", "04", "05", "08", "09"})  # not closed, listening or TIME_WAIT


def count_connections(address: str, port: int) -> int:
    """Return the number of open connections to a local address and port. Blocks.

    0.0.0.0 and :: stand for every local address.
    """
    wanted = ipaddress.ip_address(address)
    return sum(
        1
        for local, number in _open()
        if number == port and (wanted.is_unspecified or wanted in (local, getattr(local, "ipv4_mapped", None)))
    )


def _open() -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state in _OPEN:
                    address, _, port = local.partition(":")
                    yield _address(bytes.fromhex(address)), int(port, 16)


def _address(words: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address from words in the byte order of this machine."""
    packed = b"".join(struct.pack("!I", word) for (word,) in struct.iter_unpack("=I", words))
    return ipaddress.ip_address(socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed))
