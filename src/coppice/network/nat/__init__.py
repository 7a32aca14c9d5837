"""Networks for bursts of forks: namespaces with a TAP, NAT and a packet filter, made in advance.

guest -- tap0 [slot: namespace, filter, NAT] wan -- veth [this host: NAT, published ports] -- world
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

RUNTIME: Final = Path("/run/coppice")  # the pools of all data directories; a reboot removes them and their slots


def key_of(home: Path) -> str:
    """Return the key that the names of a data directory's links, namespaces and tables contain."""
    return hashlib.sha256(bytes(home.resolve())).hexdigest()[:6]
