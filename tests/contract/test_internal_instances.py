"""The stem of a fork or snapshot of a running machine cannot be seen, named or changed, and it
counts in the budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import InUse, InvalidName, NotFound
from coppice.fork import fanout
from coppice.host import forks
from coppice.model import ForkReport, State, VolumeMount
from coppice.requests import (
    DemoteRequest,
    ExecRequest,
    ForkRequest,
    GetRequest,
    InspectRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
    WaitRequest,
)
from coppice.state import locks
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, boot


async def fork(host: AsyncHost) -> object:
    """Fork the running machine."""
    return await host.call(ForkRequest(instance="oak", names=["elm"], from_running=True, atomic=True))


async def keep(host: AsyncHost) -> object:
    """Make a snapshot of the running machine."""
    return await host.call(SnapshotRequest(instance="oak", name="kept"))


@pytest.fixture(params=[fork, keep], ids=["fork", "snapshot"])
def operation(request: pytest.FixtureRequest) -> Callable[[AsyncHost], Awaitable[object]]:
    """An operation that makes a stem."""
    made: Callable[[AsyncHost], Awaitable[object]] = request.param
    return made


@asynccontextmanager
async def with_stem(
    host: AsyncHost, driver: FakeDriver, operation: Callable[[AsyncHost], Awaitable[object]]
) -> AsyncIterator[str]:
    """Hold an operation in the middle of its capture, yield its stem's id, and let it succeed."""
    before = host.local.rooms.store.ids()
    gate = driver.faults.hold_at("save")
    working = asyncio.ensure_future(operation(host))
    async with asyncio.timeout(10):
        await gate.reached.wait()
    (stem,) = host.local.rooms.store.ids() - before
    try:
        yield stem
    finally:
        gate.release.set()
        async with asyncio.timeout(10):
            await working


async def test_a_stem_is_not_listed(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    operation: Callable[[AsyncHost], Awaitable[object]],
) -> None:
    """No list, tree, report or message shows it, although it is recorded, locked and counted."""
    await fake_host.volumes.create("data", size_bytes=16 << 20)
    await boot(fake_host, volumes=[VolumeMount(volume="data", mount_path="/data", readonly=True)])
    oak = await fake_host.call(GetRequest(instance="oak"))
    counted = (await fake_host.budget()).instances
    async with make_host() as other, with_stem(fake_host, driver, operation) as stem:
        assert [instance.name for instance in await other.call(LsRequest())] == ["oak"]
        assert [node.instance.name for node in await other.tree()] == ["oak"]
        assert list(await other.stats()) == ["oak"]
        inspection = await other.call(InspectRequest(instance="oak"))
        assert (inspection.fork_count, inspection.forks) == (0, ())
        (listed,) = await other.volumes.ls()
        for volume in (listed, (await other.volumes.inspect("data")).volume):
            assert [holder.name for holder in volume.attachments if holder.holder == "instance"] == ["oak"]
        assert (await other.gc()).removed == ()
        with pytest.raises(InUse) as refusal:
            await other.volumes.rm("data")
        assert stem not in str(refusal.value)
        assert str(refusal.value).count("oak") == 1
        with pytest.raises(InUse) as refusal:
            await other.images.rm(oak.image)
        assert stem not in str(refusal.value)
        assert str(refusal.value).count("oak") == 1
        assert (await other.budget()).instances == counted + 1
        assert locks.try_lock(other.local.rooms.layout.lock(stem)) is None
        assert other.local.rooms.store.get(stem).stem_of == "oak"


async def test_a_stem_cannot_be_named(
    fake_host: AsyncHost,
    make_host: HostFactory,
    driver: FakeDriver,
    operation: Callable[[AsyncHost], Awaitable[object]],
) -> None:
    """Requests with its id raise NotFound, so other processes cannot remove it."""
    await boot(fake_host)

    async with make_host() as other, with_stem(fake_host, driver, operation) as stem:
        name = other.local.rooms.store.get(stem).name
        for ask in asked(other, stem):
            with pytest.raises(NotFound):
                await ask
        with pytest.raises(InvalidName):  # no request accepts such a name
            GetRequest(instance=name)
    await fake_host.call(RmRequest(instance="oak"))
    for instance in await fake_host.call(LsRequest()):
        assert instance.state is State.RUNNING
        await fake_host.call(RmRequest(instance=instance.id))
    if operation is keep:
        await fake_host.snapshots.rm("kept")
    await assert_tidy(fake_host)


def asked(host: AsyncHost, reference: str) -> list[Awaitable[object]]:
    """Return one call of each operation on an instance."""
    return [
        host.call(GetRequest(instance=reference)),
        host.call(InspectRequest(instance=reference)),
        host.stats(reference),
        host.tree(reference),
        host.call(RmRequest(instance=reference)),
        host.call(StartRequest(instance=reference)),
        host.call(StopRequest(instance=reference)),
        host.call(StandbyRequest(instance=reference)),
        host.call(RestoreRequest(instance=reference)),
        host.call(PromoteRequest(instance=reference)),
        host.call(DemoteRequest(instance=reference)),
        host.call(ForkRequest(instance=reference)),
        host.call(ForkRequest(instance=reference, from_running=True)),
        host.call(SnapshotRequest(instance=reference)),
        host.call(ExecRequest(instance=reference, argv=["true"])),
        host.call(WaitRequest(instance=reference, deadline_s=1)),
    ]


async def test_all_may_be_removed_while_a_running_machine_is_forked(
    fake_host: AsyncHost, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process runs `coppice rm --all` between the capture and the first fork.

    The stem stays until the forks have their files.
    """
    await boot(fake_host)

    async def fan_out(*args: Any, **options: Any) -> ForkReport:
        async with make_host() as other:
            for instance in await other.call(LsRequest()):
                await other.call(RmRequest(instance=instance.id))
        return await fanout.fan_out(*args, **options)

    monkeypatch.setattr(forks, "fan_out", fan_out)
    report = await fake_host.call(ForkRequest(instance="oak", count=3, names=["elm"], from_running=True))
    assert report.succeeded == 3, [result.error for result in report.results]
    await assert_tidy(fake_host, "elm-1", "elm-2", "elm-3")
