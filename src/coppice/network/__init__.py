"""Networks of machines: the contract of a provider, the providers, and their registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from coppice.network.nat.provider import NatNetwork
from coppice.network.passt import PasstNetwork
from coppice.network.provider import NetworkProvider, Networks
from coppice.network.unconnected import Unconnected
from coppice.network.user import UserNetwork

__all__ = ["NetworkProvider", "Networks", "standard"]


PREFERRED: Final = "COPPICE_NETWORK"  # an environment variable: the network of new machines


def standard(home: Path) -> Networks:
    """Return the providers of a data directory, the best one first."""
    database = home / "coppice.db"
    providers = [NatNetwork(home), UserNetwork(database), PasstNetwork(database), Unconnected()]
    return Networks(providers, os.environ.get(PREFERRED))
