"""Hosts that the owners of tokens may have a server ask for images."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest

from coppice.errors import Forbidden, HostCannot
from coppice.images.reach import PublicHosts, is_public

PUBLIC = ("1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1")
OTHERS = (
    *("127.0.0.1", "10.0.0.7", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *("255.255.255.255", "::", "::1", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::a00:7"),
    "2002:7f00:1::",
)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address(address: str) -> None:
    """Also if it is written as an address of IPv6."""
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OTHERS)
def test_an_address_inside_of_a_network(address: str) -> None:
    """Loopback, private, link-local, shared, multicast, and each of them inside an address of IPv6."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The addresses that names resolve to."""
    known: dict[str, list[str]] = {}

    def resolve(name: str, *_: Any, **__: Any) -> list[Any]:
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in known[name]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


def test_every_address_of_a_name_must_be_public(names: dict[str, list[str]]) -> None:
    """A name of the internet can lead inside."""
    names.update({"a.example": ["1.1.1.1", "2606:4700::1111"], "b.example": ["1.1.1.1", "10.0.0.7"]})
    names["c.example"] = ["fe80::1%eth0"]
    PublicHosts().require("a.example")
    PublicHosts().require("a.example:5000")
    for name in ("b.example", "c.example:443"):
        with pytest.raises(Forbidden, match=f"--allow-registry {name}"):
            PublicHosts().require(name)
    with pytest.raises(HostCannot, match=r"d\.example"):
        PublicHosts().require("d.example")


def test_the_operator_can_allow_hosts(names: dict[str, list[str]]) -> None:
    """At every port or at one; others stay forbidden."""
    names.update({"inside": ["10.0.0.7"], "::1": ["::1"], "other": ["10.0.0.8"]})
    PublicHosts(("inside",)).require("inside:5000")
    PublicHosts(("inside",)).require("inside")
    PublicHosts(("inside:5000",)).require("inside:5000")
    PublicHosts(("::1",)).require("::1")
    for host in ("inside:22", "inside", "other:5000", "::1"):
        with pytest.raises(Forbidden):
            PublicHosts(("inside:5000",)).require(host)
