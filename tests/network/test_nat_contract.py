"""The provider `nat` keeps the contract of network/provider.py on a real kernel."""

from __future__ import annotations

import socket

import pytest

from network_contract import Listens, NetworkContract
from worlds import World


class TestNatNetwork(NetworkContract):
    """The contract, checked with the fixtures of this folder."""

    @pytest.fixture
    def listens(self, world: World) -> Listens:
        """Return a function that listens on the host of the test."""
        return lambda: world.host.run(lambda: socket.create_server(("127.0.0.1", 0)))
