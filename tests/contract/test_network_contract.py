"""Each provider keeps the contract of network/provider.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice import network
from coppice.errors import HostCannot, NotSupported, UsageError
from coppice.model import MachineSpec
from coppice.model.network import NicBackend
from coppice.network import NetworkProvider, Networks
from coppice.network.unconnected import Unconnected
from fakes.network import SlotNetwork
from network_contract import NetworkContract

EVERY_BACKEND = frozenset(NicBackend)
# `nat` makes its slots in a real kernel, so tests/network tests it in namespaces of its own.
STANDARD = [each for each in network.standard(Path("unused")).providers if each.backend is not NicBackend.TAP]


class TestStandardNetworks(NetworkContract):
    """The providers that change nothing on this host."""

    @pytest.fixture(params=STANDARD, ids=lambda provider: provider.name)
    def provider(self, request: pytest.FixtureRequest) -> NetworkProvider:
        """One of these providers."""
        provider: NetworkProvider = request.param
        return provider


class TestSlotNetwork(NetworkContract):
    """A provider that leaves something on the host."""

    @pytest.fixture
    def provider(self, tmp_path: Path) -> NetworkProvider:
        """A provider that has no slots yet."""
        return SlotNetwork(tmp_path / "slots")


def test_a_driver_gets_only_a_network_that_it_can_attach() -> None:
    """The default is the best network that the driver can attach.

    One that it cannot attach is refused, and so is an unknown name.
    """
    networks = network.standard(Path("unused"))
    assert networks.choose(None, frozenset()) == "none"
    assert networks.choose("none", EVERY_BACKEND) == "none"
    with pytest.raises(NotSupported, match="user"):
        networks.choose("user", frozenset())
    with pytest.raises(UsageError) as refused:
        networks.choose("bridge", EVERY_BACKEND)
    assert refused.value.hint == "use nat or user or passt or none"


class Named(SlotNetwork):
    """A network that this host may be unable to provide."""

    def __init__(self, name: str, backend: NicBackend, missing: str = "", hindrance: str = "") -> None:
        super().__init__(Path("unused"))
        self.name, self.backend, self._missing, self._hindrance = name, backend, missing, hindrance

    def missing(self) -> str:
        return self._missing

    def hindrance(self) -> str:
        assert not self._missing
        return self._hindrance


@pytest.mark.parametrize(
    ("missing", "hindrance", "preferred", "able", "expected"),
    [
        ("", "", None, EVERY_BACKEND, "fast"),
        ("not root", "", None, EVERY_BACKEND, "slow"),
        ("", "a firewall", None, EVERY_BACKEND, "slow"),
        ("", "a firewall", None, frozenset({NicBackend.TAP}), "fast"),
        ("", "a firewall", "fast", EVERY_BACKEND, "fast"),
        ("", "", "slow", EVERY_BACKEND, "slow"),
        ("", "", "slow", frozenset({NicBackend.TAP}), "fast"),
        ("", "", "none", EVERY_BACKEND, "none"),
        ("not root", "", "none", frozenset({NicBackend.TAP}), "none"),
    ],
)
def test_the_default_is_the_best_network_that_can_be_had(
    missing: str, hindrance: str, preferred: str | None, able: frozenset[NicBackend], expected: str
) -> None:
    """A firewall makes a network the second choice, because guests would reach nothing; missing rights rule it out."""
    fast = Named("fast", NicBackend.TAP, missing, hindrance)
    networks = Networks([fast, Named("slow", NicBackend.USER_MODE), Unconnected()], preferred)
    assert networks.choose(None, able) == expected
    assert networks.kept("bridge", able) == expected


def test_a_host_without_any_network_says_what_is_missing() -> None:
    """A machine does not silently get no network."""
    networks = Networks([Named("fast", NicBackend.TAP, "no CAP_NET_ADMIN"), Unconnected()])
    with pytest.raises(HostCannot, match="no CAP_NET_ADMIN") as refused:
        networks.choose(None, EVERY_BACKEND)
    assert "--network none" in str(refused.value.hint)
    with pytest.raises(UsageError, match="bridge"):
        Networks([Unconnected()], "bridge").choose(None, EVERY_BACKEND)


def test_an_unknown_network_of_a_record_is_refused() -> None:
    """A record may name a network of a newer version. Its machine must not start on another one."""
    with pytest.raises(NotSupported, match="mesh"):
        network.standard(Path("unused")).of(MachineSpec(network="mesh"))
