"""Published ports in a fan-out: each fork has its own address or port for as long as it lives."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from coppice.client import AsyncHost
from coppice.errors import HostCannot, InUse, NoSpace
from coppice.model import Instance, Publish, State
from coppice.network import loopback
from coppice.network.ports import require_local
from coppice.requests import (
    ForkRequest,
    GetRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from fakes.hosting import assert_tidy, boot, make
from fakes.records import make_instance

OWN = Publish(host_port=8080, guest_port=80, host_address="own")
ANY = Publish(host_port=0, guest_port=80)


def addresses_of(*instances: Instance) -> list[str]:
    """Return the host addresses of these instances' ports."""
    return [port.host_address for instance in instances for port in instance.publish]


async def test_forks_at_once_have_addresses_of_their_own(fake_host: AsyncHost) -> None:
    """Each fork has its own loopback address, even between parallel fan-outs."""
    await make(fake_host, State.TEMPLATE)
    ports = [OWN, Publish(host_port=53, guest_port=53, protocol="udp", host_address="own"), ANY]
    reports = await asyncio.gather(
        *(fake_host.call(ForkRequest(instance="oak", count=8, publish=ports)) for _ in range(2))
    )
    forks = [fork for report in reports for fork in report.instances]
    assert len(forks) == 16
    found = [fork.publish[0].host_address for fork in forks]
    assert len(set(found)) == 16
    assert all(ip_address(address) in ip_network("127.0.0.0/8") for address in found)
    for fork in forks:
        first, second, third = fork.publish
        assert (first.host_address, first.host_port) == (second.host_address, 8080)
        assert third.host_address == "127.0.0.1"
        assert third.host_port
        assert (await fake_host.call(GetRequest(instance=fork.id))).publish == fork.publish


async def test_an_address_is_kept_and_given_back(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance keeps its address in standby.

    If the pool is empty a fork is refused as a whole, and a removal frees an address.
    """
    monkeypatch.setattr(loopback, "_POOL", "127.64.0.0/30")
    await make(fake_host, State.TEMPLATE)
    forks = (await fake_host.call(ForkRequest(instance="oak", count=4, publish=[OWN]))).instances
    assert set(addresses_of(*forks)) == {f"127.64.0.{number}" for number in range(4)}
    standby = (await fake_host.call(StandbyRequest(instance=forks[0].id))).instance
    with pytest.raises(NoSpace, match="address"):
        await fake_host.call(ForkRequest(instance="oak", names=["elm"], publish=[OWN]))
    assert (await fake_host.call(RestoreRequest(instance=standby.id))).publish == forks[0].publish
    await fake_host.call(RmRequest(instance=forks[1].id))
    (elm,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"], publish=[OWN]))).instances
    assert elm.publish == forks[1].publish
    await assert_tidy(fake_host, "oak", "elm", *(fork.name for fork in (forks[0], *forks[2:])))


async def test_a_picked_port_is_kept(fake_host: AsyncHost) -> None:
    """A port is picked at the first start, and kept through standby, restore, stop and start."""
    vm = await boot(fake_host, publish=[ANY, OWN])
    port, own = vm.publish
    assert port.host_port
    assert ip_address(own.host_address).is_loopback
    await fake_host.call(StandbyRequest(instance=vm.id))
    assert (await fake_host.call(RestoreRequest(instance=vm.id))).publish == vm.publish
    await fake_host.call(StopRequest(instance=vm.id, grace_s=0))
    assert (await fake_host.call(StartRequest(instance=vm.id))).publish == vm.publish
    parked = (
        await fake_host.call(
            ForkRequest(instance="oak", from_running=True, names=["elm"], target=State.STANDBY, publish=[ANY])
        )
    ).instances
    assert [each.publish for each in parked] == [(ANY,)]
    assert (await fake_host.call(RestoreRequest(instance="elm"))).publish[0].host_port not in (0, port.host_port)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_port_that_is_in_use_is_named(fake_host: AsyncHost, protocol: str) -> None:
    """A new fork and a restore are refused before anything starts, and the instance
    stays as it is.
    """
    await make(fake_host, State.TEMPLATE)
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            other.listen(1)
        number = other.getsockname()[1]
        port = Publish(host_port=number, guest_port=80, protocol="udp" if protocol == "udp" else "tcp")
        (failed,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"], publish=[port]))).results
        assert failed.error
        assert f"127.0.0.1:{number}/{protocol}" in failed.error
        assert failed.error_code == InUse.code
        await fake_host.call(ForkRequest(instance="oak", names=["ash"], publish=[port], target=State.STANDBY))
        with pytest.raises(InUse, match=str(number)):
            await fake_host.call(RestoreRequest(instance="ash"))
        await assert_tidy(fake_host, "oak", "ash")
    assert (await fake_host.call(RestoreRequest(instance="ash"))).state is State.RUNNING


async def test_an_address_of_another_host_is_named(fake_host: AsyncHost) -> None:
    """An address that this host does not have is refused by name."""
    with pytest.raises(HostCannot, match=r"192\.0\.2\.1"):
        await boot(fake_host, publish=[Publish(host_port=8080, guest_port=80, host_address="192.0.2.1")])
    await assert_tidy(fake_host)


async def test_an_address_of_another_host_is_named_before_anything_starts(fake_host: AsyncHost) -> None:
    """An instance or a fork that is made at rest would fail only at its start."""
    elsewhere = Publish(host_port=8080, guest_port=80, host_address="192.0.2.1")
    with pytest.raises(HostCannot, match=r"192\.0\.2\.1: it is not an address of this host"):
        await boot(fake_host, publish=[elsewhere], start=False)
    await make(fake_host, State.TEMPLATE)
    with pytest.raises(HostCannot, match=r"192\.0\.2\.1"):
        await fake_host.call(ForkRequest(instance="oak", names=["elm"], publish=[elsewhere], target=State.STANDBY))
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("number", [errno.EADDRINUSE, errno.EACCES, errno.EINVAL, errno.EAFNOSUPPORT])
def test_only_an_address_that_the_kernel_denies_is_refused(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Any other error says nothing about the address."""

    class Probe(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", Probe)
    require_local([Publish(host_port=80, guest_port=80, host_address="192.0.2.1"), OWN])


def test_addresses_of_two_data_directories_seldom_collide(tmp_path: Path) -> None:
    """The search starts at a point that depends on the instance's id, since data directories do not
    know each other's addresses.
    """
    made = [loopback.with_own_address(make_instance(f"vm{number}", publish=(OWN,)), set()) for number in range(64)]
    assert len(set(addresses_of(*made))) > 60
