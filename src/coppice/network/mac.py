"""MAC addresses."""

from __future__ import annotations

import hashlib


def mac_address(instance_id: str) -> str:
    """Return the MAC address of an instance: locally administered, unicast, and constant all its
    life.

    Among 4096 instances, two have the same with a chance of 8 in a million. That is harmless on a
    user-mode network, where each NIC is alone.
    """
    digest = hashlib.sha256(f"coppice:mac:{instance_id}".encode()).digest()
    return bytes([0x02, *digest[:5]]).hex(":")
