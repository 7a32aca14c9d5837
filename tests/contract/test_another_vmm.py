"""A disk can move to another VMM; captured memory cannot."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from coppice.client import AsyncHost
from coppice.errors import NotSupported, UsageError
from coppice.model import SnapshotKind, State
from fakes.driver import CAPABILITIES, FakeDriver
from fakes.rooms import DEADLINES, IMAGE, open_rooms

WITHOUT_NICS = msgspec.structs.replace(CAPABILITIES, nic_backends=frozenset())


@pytest.fixture
async def other(fake_vmm: Path, fake_home: Path) -> AsyncIterator[FakeDriver]:
    """A second VMM, which cannot attach NICs."""
    driver = FakeDriver(fake_vmm, name="other", capabilities=WITHOUT_NICS)
    yield driver
    await driver.end(fake_home / "instances")


@pytest.fixture
async def host(driver: FakeDriver, other: FakeDriver, fake_home: Path) -> AsyncIterator[AsyncHost]:
    """A host with both VMMs, which makes new machines with the first one."""
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(
            AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0)
        )
        opened.local.rooms.drivers.choose(other)
        opened.local.rooms.drivers.choose(driver)
        yield opened


async def test_a_disk_goes_to_another_vmm(host: AsyncHost) -> None:
    """A fork without memory is started by the requested VMM, with the source's disk and a network
    that this VMM can attach.
    """
    source = await host.run(IMAGE, name="source")
    await source.exec(["save", "on disk"])
    await source.freeze()
    (moved,) = await source.fork(1, target=State.STOPPED, vmm="other")
    assert (moved.record.driver, moved.record.machine.network) == ("other", "none")
    assert source.record.driver == "fake"
    await moved.start()
    assert (await moved.exec(["load"])).stdout == b"on disk\n"
    (back,) = await moved.fork(1, target=State.STOPPED, from_running=True, vmm="fake")
    assert back.record.driver == "fake"
    await moved.stop()
    (running,) = await moved.fork(1, vmm="fake")  # a Stopped source: its fork boots
    assert (await running.exec(["load"])).stdout == b"on disk\n"


async def test_a_stopped_snapshot_goes_to_another_vmm(host: AsyncHost) -> None:
    """A fork of a disk-only snapshot can move to another VMM, like a fork of a Stopped instance."""
    source = await host.run(IMAGE, name="source")
    await source.exec(["save", "kept"])
    kept = await source.snapshot(name="kept", kind=SnapshotKind.STOPPED)
    (moved,) = await host.snapshots.fork(kept.name, vmm="other")
    assert moved.record.driver == "other"
    assert (await moved.exec(["load"])).stdout == b"kept\n"


async def test_memory_stays_with_its_vmm(host: AsyncHost) -> None:
    """A fork with memory to another VMM is refused with a hint, before anything is made."""
    source = await host.run(IMAGE, name="source")
    template = await source.freeze()
    for target in (State.RUNNING, State.STANDBY):
        with pytest.raises(NotSupported, match="other cannot load the memory of source") as refused:
            await template.fork(1, target=target, vmm="other")
        assert "--target stopped --vmm other" in (refused.value.hint or "")
    with pytest.raises(UsageError, match="there is no VMM 'vmware'"):
        await template.fork(1, target=State.STOPPED, vmm="vmware")
    assert [machine.name for machine in await host.ls()] == ["source"]


async def test_run_takes_the_vmm_of_one_machine(host: AsyncHost) -> None:
    """`run(vmm=...)` chooses the VMM of that machine alone; the host's default stays."""
    one = await host.run(IMAGE, name="one", vmm="other")
    two = await host.run(IMAGE, name="two")
    assert (one.record.driver, two.record.driver) == ("other", "fake")
    with pytest.raises(UsageError, match="there is no VMM"):
        await host.run(IMAGE, vmm="vmware")
