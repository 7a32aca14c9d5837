"""A machine keeps the network that it was made with, and its attachment is removed with its VMM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import CoppiceError, NotSupported, UsageError
from coppice.model import Instance, Publish, State
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    GetRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartAheadRequest,
    StartRequest,
    StopRequest,
)
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.faults import Faults
from fakes.hosting import assert_tidy, boot, make
from fakes.network import SLOTS, attached
from fakes.records import MACHINE, make_instance

ANY = Publish(host_port=0, guest_port=80)
NETWORKS = ["user", "none", SLOTS]


def mac_of(driver: FakeDriver, host: AsyncHost, instance: Instance) -> str:
    """Return the guest's MAC."""
    return driver.guest_state(host.local.rooms.directory(instance.id)).mac


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    """Each network in turn."""
    name: str = request.param
    return name


async def test_every_descendant_has_the_network_of_its_source(
    fake_host: AsyncHost, driver: FakeDriver, network: str
) -> None:
    """A vmstate with a NIC loads only into a machine with a NIC, so forks keep the network."""
    oak = await boot(fake_host, network=network)
    assert oak.machine.network == network
    live = (await fake_host.call(ForkRequest(instance="oak", names=["live"], from_running=True, atomic=True))).instances
    kept = await fake_host.call(SnapshotRequest(instance="oak", name="twig"))
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(RestoreRequest(instance="oak"))
    await fake_host.call(StopRequest(instance="oak", grace_s=0))
    await fake_host.call(StartRequest(instance="oak"))
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(PromoteRequest(instance="oak"))
    await fake_host.call(StartAheadRequest(instance="oak"))
    forks = (await fake_host.call(ForkRequest(instance="oak", count=2, names=["elm"], atomic=True))).instances
    disks = (
        await fake_host.call(ForkRequest(instance="oak", names=["disk"], target=State.STOPPED, atomic=True))
    ).instances
    grown = (await fake_host.call(SnapshotForkRequest(snapshot=kept.id, names=["ash"], atomic=True))).instances
    await fake_host.call(StartRequest(instance="disk"))
    await fake_host.call(SnapshotRequest(instance="ash", name="ring"))
    await fake_host.call(SnapshotRestoreRequest(snapshot="ring", start=True))
    assert {each.machine.network for each in (*live, *forks, *disks, *grown)} == {network}
    await assert_tidy(fake_host, "oak", "live", "elm-1", "elm-2", "disk", "ash")
    macs = [mac_of(driver, fake_host, each) for each in await fake_host.call(LsRequest()) if each.vmm]
    assert len(macs) == 5
    assert set(macs) == {""} if network == "none" else len(set(macs)) == 5
    for each in await fake_host.call(LsRequest()):
        if each.name != "oak":
            await fake_host.call(RmRequest(instance=each.id))
    await fake_host.call(RmRequest(instance="oak"))
    assert attached(fake_host.home) == set()


async def test_a_fork_takes_neither_mac_nor_port_of_its_source(
    fake_host: AsyncHost, driver: FakeDriver, network: str
) -> None:
    """A fork has its own MAC and publishes only the ports requested for it."""
    ports = [] if network == "none" else [ANY]
    oak = await boot(fake_host, network=network, publish=ports)
    own = mac_of(driver, fake_host, oak)
    (fork,) = (await fake_host.call(ForkRequest(instance="oak", from_running=True, atomic=True))).instances
    assert fork.publish == ()
    assert bool(own) == (network != "none")
    assert mac_of(driver, fake_host, fork) != own or network == "none"
    assert mac_of(driver, fake_host, oak) == own


async def test_a_machine_without_a_network_publishes_nothing(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The refusal has a hint, and comes before anything is made or paused."""
    with pytest.raises(UsageError) as refused:
        await boot(fake_host, network="none", publish=[ANY])
    assert "--network" in (refused.value.hint or "")
    await assert_tidy(fake_host)
    oak = await boot(fake_host, network="none")
    with pytest.raises(UsageError):
        await fake_host.call(ForkRequest(instance="oak", from_running=True, publish=[ANY]))
    assert driver.faults.reached["pause"] == 0
    await fake_host.call(SnapshotRequest(instance=oak.id, name="twig"))
    await fake_host.call(StandbyRequest(instance=oak.id))
    with pytest.raises(UsageError):
        await fake_host.call(ForkRequest(instance="oak", publish=[ANY]))
    with pytest.raises(UsageError):
        await fake_host.call(SnapshotForkRequest(snapshot="twig", publish=[ANY]))
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("address", ["::1", "::", "2001:db8::1"])
async def test_an_ipv6_host_address_is_refused(fake_host: AsyncHost, address: str) -> None:
    """The stack in the VMM listens on IPv4 only. The refusal says what to write instead."""
    port = Publish(host_port=8080, guest_port=80, host_address=address)
    with pytest.raises(UsageError) as refused:
        await boot(fake_host, publish=[port])
    assert address in refused.value.message
    assert "127.0.0.1" in (refused.value.hint or "")
    await make(fake_host, State.TEMPLATE)
    with pytest.raises(UsageError):
        await fake_host.call(ForkRequest(instance="oak", publish=[port]))
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("boot", Faults.fail_at),
        ("booted", Faults.fail_at),
        ("booted", Faults.die_at),
        ("identity", Faults.fail_at),
        ("identity", Faults.die_at),
    ],
)
async def test_a_failed_start_detaches_the_network(
    fake_host: AsyncHost, driver: FakeDriver, step: str, fault: Callable[[Faults, str], None]
) -> None:
    """A failed start detaches the network, whether the machine is new or existed before."""
    await make(fake_host, State.STOPPED)
    for start in (boot(fake_host, "elm"), fake_host.call(StartRequest(instance="oak"))):
        fault(driver.faults, step)
        with pytest.raises(CoppiceError):
            await start
    await assert_tidy(fake_host, "oak")
    assert (await fake_host.call(StartRequest(instance="oak"))).state is State.RUNNING
    await assert_tidy(fake_host, "oak")


async def test_the_network_of_a_dead_vmm_is_detached(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The first process that notices the end of the VMM detaches its network."""
    oak = await boot(fake_host)
    assert oak.vmm
    await driver.quit(fake_host.local.rooms.directory(oak.id), oak.vmm)
    assert attached(fake_host.home) == {oak.id}
    assert (await fake_host.call(GetRequest(instance="oak"))).state is State.STOPPED
    await assert_tidy(fake_host, "oak")


async def test_a_network_without_an_owner_is_detached(fake_host: AsyncHost, make_host: HostFactory) -> None:
    """gc names and detaches it; a dry run only names it.

    The next host that opens detaches it too. A spare's network is left alone.
    """
    await make(fake_host, State.TEMPLATE)
    await fake_host.call(StartAheadRequest(instance="oak"))
    (spare,) = attached(fake_host.home)
    networks, able = fake_host.local.rooms.networks, CAPABILITIES.nic_backends
    lost = make_instance(machine=msgspec.structs.replace(MACHINE, network=SLOTS))
    await networks.attach(lost, able)
    for dry_run in (True, False):
        assert f"network of {lost.id}" in (await fake_host.gc(dry_run=dry_run)).removed
        assert attached(fake_host.home) == ({lost.id, spare} if dry_run else {spare})
    await networks.attach(lost, able)
    async with make_host():
        assert attached(fake_host.home) == {spare}
    await fake_host.call(DemoteRequest(instance="oak"))
    await assert_tidy(fake_host, "oak")


async def test_the_network_of_an_interrupted_restore_is_detached(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver
) -> None:
    """The next host leaves nothing attached for a machine that its dead host was starting."""
    oak = await make(fake_host, State.STANDBY)
    dead = await asyncio.to_thread(Store, fake_host.local.rooms.layout.database, (1, 1))
    dead.begin(oak, JournalOperation.RESTORE)
    dead.close()
    await fake_host.local.rooms.networks.attach(oak, CAPABILITIES.nic_backends)
    async with make_host() as other:
        assert attached(other.home) == set()
        assert (await other.call(RestoreRequest(instance="oak"))).state is State.RUNNING
        await assert_tidy(other, "oak")


async def test_a_driver_without_the_network_does_not_start_the_machine(
    fake_host: AsyncHost, driver: FakeDriver
) -> None:
    """A driver that cannot attach the network raises NotSupported, and the machine
    stays as it is.
    """
    await make(fake_host, State.STOPPED)
    driver._capabilities = msgspec.structs.replace(CAPABILITIES, nic_backends=frozenset())
    with pytest.raises(NotSupported, match=SLOTS):
        await fake_host.call(StartRequest(instance="oak"))
    await assert_tidy(fake_host, "oak")
    assert (await boot(fake_host, "elm", network=None)).machine.network == "none"
