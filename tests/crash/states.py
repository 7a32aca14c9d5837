"""The states of machines and volumes in which operations begin whose host is killed."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import msgspec

from coppice.client import AsyncHost
from coppice.machine import disk, disks
from coppice.memory import layers
from coppice.model import MIB, Instance, State, VolumeMount
from coppice.requests import (
    ExportRequest,
    ForkRequest,
    GetRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartAheadRequest,
)
from crash.kinds import Kind
from crash.operation import OAK, SAP, STUMP

VOLUME = 32 * MIB


async def nothing(host: AsyncHost, _: Kind) -> None:
    """Prepare nothing."""


async def running(host: AsyncHost, kind: Kind) -> None:
    """Make a Running oak, with text in its memory and on its disk that the stump does not have."""
    await host.call(ForkRequest(instance=STUMP, names=[OAK], atomic=True))
    await kind.learn(host, OAK)


async def on_layers(host: AsyncHost, kind: Kind) -> None:
    await running(host, kind)
    await host.call(StandbyRequest(instance=OAK))


async def running_on_layers(host: AsyncHost, kind: Kind) -> None:
    await on_layers(host, kind)
    await host.call(RestoreRequest(instance=OAK))


async def on_all_layers(host: AsyncHost, kind: Kind) -> None:
    """Make a Running oak whose next capture merges its layers."""
    await running_on_layers(host, kind)
    for _ in range(1, layers.MOST):
        await host.call(StandbyRequest(instance=OAK))
        await host.call(RestoreRequest(instance=OAK))


async def on_large_layers(host: AsyncHost, kind: Kind) -> None:
    """Make a Running oak whose next capture is a whole mem-file: its layers would exceed half of its RAM."""
    await running(host, kind)
    await kind.dirty(host, OAK, kind.memory_bytes // 4)
    oak = (await host.call(StandbyRequest(instance=OAK))).instance
    assert oak.capture is not None
    assert oak.capture.layers
    await host.call(RestoreRequest(instance=OAK))
    await kind.dirty(host, OAK, kind.memory_bytes // 4)


async def capture_whole(host: AsyncHost, _: Kind) -> None:
    oak = (await host.call(StandbyRequest(instance=OAK))).instance
    assert oak.capture is not None
    assert not oak.capture.layers


@contextlib.contextmanager
def _mapping_no_layers(host: AsyncHost) -> Iterator[None]:
    """The driver cannot map layers during the block, as on a host that no longer permits to trace a VMM."""
    driver = host.local.rooms.drivers.chosen
    able = msgspec.structs.replace(driver.capabilities, maps_layers=False)
    with patch.object(type(driver), "capabilities", able):
        yield


async def fork_flat(host: AsyncHost, _: Kind) -> None:
    with _mapping_no_layers(host):
        (elm,) = (await host.call(ForkRequest(instance=OAK, names=["elm"], atomic=True))).instances
    assert elm.capture is not None
    assert not elm.capture.layers


async def on_layers_with_snapshot(host: AsyncHost, kind: Kind) -> None:
    await on_layers(host, kind)
    await host.call(SnapshotRequest(instance=OAK, name="twig"))


async def restore_snapshot_flat(host: AsyncHost, _: Kind) -> None:
    with _mapping_no_layers(host):
        oak = await host.call(SnapshotRestoreRequest(snapshot="twig"))
    assert oak.capture is not None
    assert not oak.capture.layers


async def forked(host: AsyncHost, kind: Kind) -> None:
    """Make a Standby oak whose disk a fork shares."""
    await on_layers(host, kind)
    await host.call(ForkRequest(instance=OAK, names=["elm"], target=State.STANDBY, atomic=True))


async def forked_often(host: AsyncHost, kind: Kind) -> None:
    """Make a Standby oak whose next start or fork merges the layers of its disk, as older versions left it."""
    await forked(host, kind)
    most, disk.MOST = disk.MOST, disk.MOST + 1
    try:
        for _ in range(1, most):
            await host.call(RestoreRequest(instance=OAK))
            await host.call(StandbyRequest(instance=OAK))
            await host.call(RmRequest(instance="elm"))
            await host.call(ForkRequest(instance=OAK, names=["elm"], target=State.STANDBY, atomic=True))
    finally:
        disk.MOST = most


async def booted(host: AsyncHost, kind: Kind) -> None:
    await boot(host, kind)
    await kind.learn(host, OAK)


async def boot(host: AsyncHost, kind: Kind, *volumes: str, name: str = OAK, readonly: bool = False) -> Instance:
    """Make a Running machine from an image, with some volumes mounted."""
    return await host.call(
        RunRequest(
            image=kind.image,
            command=["sleep", "infinity"],
            name=name,
            memory_bytes=kind.memory_bytes,
            overlay_bytes=kind.overlay_bytes,
            volumes=[VolumeMount(volume=each, mount_path=f"/srv/{each}", readonly=readonly) for each in volumes],
        )
    )


async def standby(host: AsyncHost, _: Kind) -> None:
    await host.call(ForkRequest(instance=STUMP, names=[OAK], target=State.STANDBY, atomic=True))


async def fork_ahead(host: AsyncHost, _: Kind) -> None:
    await host.call(StartAheadRequest(instance=STUMP))
    (result,) = (await host.call(ForkRequest(instance=STUMP, names=[OAK]))).results
    assert result.started_ahead


async def stopped(host: AsyncHost, _: Kind) -> None:
    await host.call(ForkRequest(instance=STUMP, names=[OAK], target=State.STOPPED, atomic=True))


async def template(host: AsyncHost, kind: Kind) -> None:
    await standby(host, kind)
    await host.call(PromoteRequest(instance=OAK))


async def with_snapshot(host: AsyncHost, kind: Kind) -> None:
    await running(host, kind)
    await host.call(SnapshotRequest(instance=OAK, name="twig"))


async def twig(host: AsyncHost, _: Kind) -> None:
    await host.call(SnapshotRequest(instance=STUMP, name="twig"))


async def sap(host: AsyncHost, _: Kind) -> None:
    await host.volumes.create(SAP, size_bytes=VOLUME)


async def archive(host: AsyncHost, _: Kind) -> None:
    with tarfile.open(archive_of(host), "w") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"rings/{number}")
            member.size = 64 << 10
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))


def archive_of(host: AsyncHost) -> Path:
    return host.local.rooms.layout.home.parent / "sap.tar"


async def drink(host: AsyncHost, kind: Kind) -> None:
    await boot(host, kind, SAP)


async def drinking(host: AsyncHost, kind: Kind) -> None:
    await sap(host, kind)
    await drink(host, kind)
    await kind.learn(host, OAK, f"/srv/{SAP}")


async def resting_with_a_volume(host: AsyncHost, kind: Kind) -> None:
    await drinking(host, kind)
    await host.call(StandbyRequest(instance=OAK))


async def branch(host: AsyncHost, target: State = State.STANDBY) -> None:
    """Fork oak in any state, with a clone of its volume."""
    running = (await host.call(GetRequest(instance=OAK))).state is State.RUNNING
    request = ForkRequest(
        instance=OAK, names=["elm"], target=target, from_running=running, volume_policy="clone", atomic=True
    )
    await host.call(request)


async def branched(host: AsyncHost, kind: Kind) -> None:
    """Make a Running oak whose volume has a layer over what a fork shares."""
    await drinking(host, kind)
    await branch(host)


async def branched_at_rest(host: AsyncHost, kind: Kind) -> None:
    """Make a Standby oak whose volume is shared with a fork, and needs a layer."""
    await resting_with_a_volume(host, kind)
    await branch(host)


async def branched_and_felled(host: AsyncHost, kind: Kind) -> None:
    """Make a volume with a layer, without a writer."""
    await drinking(host, kind)
    await branch(host, State.STOPPED)
    await host.call(RmRequest(instance=OAK))


async def sip(host: AsyncHost, kind: Kind) -> None:
    await boot(host, kind, SAP, readonly=True)


async def running_on_all_disk_layers(host: AsyncHost, kind: Kind) -> None:
    """Make a Running oak whose next capture merges the layers of its disk."""
    await forked_often(host, kind)
    await host.call(RestoreRequest(instance=OAK))
    await host.call(RmRequest(instance="elm"))
    oak = await host.call(GetRequest(instance=OAK))
    while host.local.rooms.driver(oak).capabilities.switches_layers and len(disks.of(oak)[0].layers) < disk.MOST:
        await host.call(ForkRequest(instance=OAK, names=["elm"], from_running=True, target=State.STOPPED))
        await host.call(RmRequest(instance="elm"))
        oak = await host.call(GetRequest(instance=OAK))


async def on_all_disk_layers(host: AsyncHost, kind: Kind) -> None:
    """Make a Standby oak that a promotion or a fork merges the layers of the disk of."""
    await running_on_all_disk_layers(host, kind)
    await host.call(StandbyRequest(instance=OAK))


async def exported(host: AsyncHost, _: Kind) -> None:
    """Make an archive of the stump."""
    await host.call(ExportRequest(instance=STUMP, path=str(export_of(host))))


def export_of(host: AsyncHost) -> Path:
    """Return the path of the archive of the stump."""
    return host.local.rooms.layout.home.parent / "stump.coppice"
