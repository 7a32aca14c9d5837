"""A burst of forks on Firecracker's double: each has a slot of its own, and all slots go again."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.linux import netns, nft
from coppice.machine.rooms import Deadlines, Rooms
from coppice.model import State
from coppice.model.network import NicBackend
from coppice.network import Networks
from coppice.network.nat import key_of
from coppice.network.nat.addresses import TAP, prefix
from coppice.network.nat.pool import Pool
from coppice.network.nat.provider import NatNetwork
from coppice.requests import ForkRequest, RmRequest
from coppice.state.layout import Layout
from coppice.vmm.registry import Drivers
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.hosting import make
from fakes.rooms import open_rooms
from slots import leftovers
from worlds import World

COUNT = 256
WAITING = 64  # slots for the next burst, at most
# All start at once on a host with two CPUs, and each is given that long.
PATIENT = Deadlines(boot=30.0, ready=120.0, stop=5.0, lock=120.0)


@pytest.fixture
def pool(world: World, fake_home: Path, tmp_path: Path, resolv_conf: Path) -> Iterator[Pool]:
    """The slots of the data directory, in the world of the test."""
    pool = Pool(key_of(fake_home), world.host.path, tmp_path / "run", resolv_conf)
    yield pool
    for left in pool.used():  # of a test that failed
        pool.release(left)
    pool.tidy(keep=False)


@pytest.fixture
async def host(fake_vmm: Path, fake_home: Path, pool: Pool) -> AsyncIterator[AsyncHost]:
    """A host whose machines are Firecracker's doubles in slots."""
    capabilities = msgspec.structs.replace(CAPABILITIES, nic_backends=frozenset({NicBackend.TAP}))
    driver = FakeDriver(fake_vmm, capabilities=capabilities)

    def open_with_slots(layout: Layout, drivers: Drivers, deadlines: Deadlines) -> Rooms:
        networks = Networks([NatNetwork(fake_home, pool)])
        return msgspec.structs.replace(open_rooms(layout, drivers, deadlines), networks=networks)

    async with AsyncExitStack() as stack:
        stack.push_async_callback(driver.end, fake_home / "instances")
        opened = AsyncHost(fake_home, driver=driver, deadlines=PATIENT, open_rooms=open_with_slots, spares=0)
        yield await stack.enter_async_context(opened)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("personality", ["firecracker"], indirect=True)
@pytest.mark.quiet
async def test_a_burst_of_forks_has_as_many_slots(world: World, host: AsyncHost, pool: Pool) -> None:
    """One call makes 256 forks. Each VMM is in the namespace of its own slot, which has a TAP and a
    ruleset; when the forks are gone, the kernel has nothing of them.
    """
    template = await make(host, State.TEMPLATE, network="nat")
    report = await host.call(ForkRequest(instance=template.id, count=COUNT, names=["elm"], atomic=True))
    forks = report.instances
    assert len({fork.id for fork in forks}) == COUNT
    slots = {fork.id: pool.find(fork.id) for fork in forks}
    assert len({slot.number for slot in slots.values() if slot}) == COUNT
    assert pool.used() == {fork.id for fork in forks}
    for fork in forks:
        slot, process = slots[fork.id], fork.vmm
        assert slot is not None
        assert process is not None
        assert os.path.samestat(Path(f"/proc/{process.pid}/ns/net").stat(), slot.namespace.stat())
        assert TAP in netns.inside(slot.namespace, lambda: [name for _, name in socket.if_nameindex()])
    for slot in [slot for slot in slots.values() if slot][:: COUNT // 8]:
        tables = netns.inside(slot.namespace, lambda: nft.read("list tables"))
        assert [each["table"]["name"] for each in tables if "table" in each] == ["slot"]
    async with asyncio.timeout(60):
        while pool.free() < WAITING:  # noqa: ASYNC110 - a process makes them
            await asyncio.sleep(0.05)
    assert len(world.host.left(prefix(pool.key))) == COUNT + WAITING
    await asyncio.gather(*(host.call(RmRequest(instance=fork.id)) for fork in forks))
    assert pool.used() == set()
    await host.call(RmRequest(instance=template.id))
    assert leftovers(pool.key, world) == []
