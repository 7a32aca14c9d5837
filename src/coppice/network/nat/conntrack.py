"""The connections that a slot's guest has accepted, as the kernel tracks them."""

from __future__ import annotations

import socket
from typing import Any, Final

from coppice.network.nat.addresses import Slot

_OPEN: Final = frozenset({2, 3, 4, 5, 6})  # TCP states of nf_conntrack: SYN_RECV to LAST_ACK, without TIME_WAIT


def count_inbound(slot: Slot) -> int:
    """Return the number of open TCP connections to the guest of a slot. Blocks.

    The caller is in the slot's namespace. Connections that the guest started do not count.

    :raises OSError: the kernel refused
    """
    from pyroute2 import NFCTSocket  # takes 0.2 s

    found = 0
    for family, own in ((socket.AF_INET, slot.address4), (socket.AF_INET6, slot.address6)):
        with NFCTSocket(nfgen_family=family) as kernel:
            found += sum(1 for entry in kernel.dump() if _is_open(entry) and _destination(entry) == str(own))
    return found


def _is_open(entry: Any) -> bool:
    state = _path(entry, "CTA_PROTOINFO", "CTA_PROTOINFO_TCP", "CTA_PROTOINFO_TCP_STATE")
    return state in _OPEN and _path(entry, "CTA_TUPLE_ORIG", "CTA_TUPLE_PROTO", "CTA_PROTO_NUM") == socket.IPPROTO_TCP


def _destination(entry: Any) -> str | None:
    addresses = _path(entry, "CTA_TUPLE_ORIG", "CTA_TUPLE_IP")
    if addresses is None:
        return None
    found = addresses.get_attr("CTA_IP_V4_DST") or addresses.get_attr("CTA_IP_V6_DST")
    return str(found)


def _path(entry: Any, *names: str) -> Any:
    """Return a nested attribute, or None."""
    for name in names:
        entry = None if entry is None else entry.get_attr(name)
    return entry
