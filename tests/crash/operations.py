"""The operations in which host processes are killed: the state before, the call, and the states
allowed afterwards.

The operation changes the machine `oak`. `stump` is the template of all machines. After a kill each
new machine is complete or absent, and each old machine is in the state before or after the
operation.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from coppice.client import AsyncHost
from coppice.machine import disk
from coppice.memory import layers
from coppice.model import MIB, Instance, State, VolumeMount
from coppice.requests import (
    DemoteRequest,
    ExportRequest,
    ForkRequest,
    ImportTemplateRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartAheadRequest,
    StartRequest,
    StopRequest,
)
from crash.kinds import Kind
from crash.operation import OAK, SAP, SEED, STUMP, Operation, States

VOLUME = 32 * MIB


def _may(*states: State | None) -> States:
    return frozenset(states)


async def nothing(host: AsyncHost, _: Kind) -> None:
    """Prepare nothing."""


async def running(host: AsyncHost, kind: Kind) -> None:
    """Make a Running oak, with text in its memory and on its disk that the stump does not have."""
    await host.call(ForkRequest(instance=STUMP, names=[OAK], atomic=True))
    await kind.learn(host, OAK)


async def _on_layers(host: AsyncHost, kind: Kind) -> None:
    await running(host, kind)
    await host.call(StandbyRequest(instance=OAK))


async def _running_on_layers(host: AsyncHost, kind: Kind) -> None:
    await _on_layers(host, kind)
    await host.call(RestoreRequest(instance=OAK))


async def _on_all_layers(host: AsyncHost, kind: Kind) -> None:
    """Make a Running oak whose next capture merges its layers."""
    await _running_on_layers(host, kind)
    for _ in range(1, layers.MOST):
        await host.call(StandbyRequest(instance=OAK))
        await host.call(RestoreRequest(instance=OAK))


async def _forked(host: AsyncHost, kind: Kind) -> None:
    """Make a Standby oak whose disk a fork shares."""
    await _on_layers(host, kind)
    await host.call(ForkRequest(instance=OAK, names=["elm"], target=State.STANDBY, atomic=True))


async def _forked_often(host: AsyncHost, kind: Kind) -> None:
    """Make a Standby oak whose next start merges the layers of its disk."""
    await _forked(host, kind)
    for _ in range(1, disk.MOST):
        await host.call(RestoreRequest(instance=OAK))
        await host.call(StandbyRequest(instance=OAK))
        await host.call(RmRequest(instance="elm"))
        await host.call(ForkRequest(instance=OAK, names=["elm"], target=State.STANDBY, atomic=True))


async def _booted(host: AsyncHost, kind: Kind) -> None:
    await boot(host, kind)
    await kind.learn(host, OAK)


async def boot(host: AsyncHost, kind: Kind, *volumes: str, name: str = OAK) -> Instance:
    """Make a Running machine from an image, with some volumes mounted."""
    return await host.call(
        RunRequest(
            image=kind.image,
            command=["sleep", "infinity"],
            name=name,
            memory_bytes=kind.memory_bytes,
            overlay_bytes=kind.overlay_bytes,
            volumes=[VolumeMount(volume=each, mount_path=f"/srv/{each}") for each in volumes],
        )
    )


async def _standby(host: AsyncHost, _: Kind) -> None:
    await host.call(ForkRequest(instance=STUMP, names=[OAK], target=State.STANDBY, atomic=True))


async def _ahead(host: AsyncHost, _: Kind) -> None:
    await host.call(StartAheadRequest(instance=STUMP))
    (result,) = (await host.call(ForkRequest(instance=STUMP, names=[OAK]))).results
    assert result.started_ahead


async def _stopped(host: AsyncHost, _: Kind) -> None:
    await host.call(ForkRequest(instance=STUMP, names=[OAK], target=State.STOPPED, atomic=True))


async def _template(host: AsyncHost, kind: Kind) -> None:
    await _standby(host, kind)
    await host.call(PromoteRequest(instance=OAK))


async def _with_snapshot(host: AsyncHost, kind: Kind) -> None:
    await running(host, kind)
    await host.call(SnapshotRequest(instance=OAK, name="twig"))


async def _twig(host: AsyncHost, _: Kind) -> None:
    await host.call(SnapshotRequest(instance=STUMP, name="twig"))


async def _sap(host: AsyncHost, _: Kind) -> None:
    await host.volumes.create(SAP, size_bytes=VOLUME)


async def _archive(host: AsyncHost, _: Kind) -> None:
    with tarfile.open(_archive_of(host), "w") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"rings/{number}")
            member.size = 64 << 10
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))


def _archive_of(host: AsyncHost) -> Path:
    return host.local.rooms.layout.home.parent / "sap.tar"


async def _exported(host: AsyncHost, _: Kind) -> None:
    await host.call(ExportRequest(instance=STUMP, path=str(_export_of(host))))


def _export_of(host: AsyncHost) -> Path:
    return host.local.rooms.layout.home.parent / "stump.coppice"


async def _drink(host: AsyncHost, kind: Kind) -> None:
    await boot(host, kind, SAP)


async def _drinking(host: AsyncHost, kind: Kind) -> None:
    await _sap(host, kind)
    await _drink(host, kind)
    await kind.learn(host, OAK)


_RUNNING, _STANDBY, _STOPPED = State.RUNNING, State.STANDBY, State.STOPPED

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "fork",
            nothing,
            lambda host, _: host.call(ForkRequest(instance=STUMP, names=[OAK])),
            {OAK: _may(_RUNNING, None)},
            steps=38,
            seconds=0.35,
        ),
        Operation(
            "fork-started-ahead",
            nothing,
            _ahead,
            {OAK: _may(_RUNNING, None)},
            repeatable=False,  # the spare is lost with the server
            steps=60,
            seconds=0.5,
        ),
        Operation(
            "fan-out",
            nothing,
            lambda host, _: host.call(ForkRequest(instance=STUMP, names=[OAK], count=3)),
            {f"{OAK}-{number}": _may(_RUNNING, None) for number in (1, 2, 3)},
            steps=108,
            seconds=0.8,
        ),
        Operation("fork-to-standby", nothing, _standby, {OAK: _may(_STANDBY, None)}, steps=15, seconds=0.06),
        Operation(
            "fork-from-running",
            running,
            lambda host, _: host.call(ForkRequest(instance=OAK, names=["elm"], from_running=True)),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            memory=OAK,
            disk=OAK,
            steps=84,
            seconds=0.8,
        ),
        Operation(
            "standby",
            running,
            lambda host, _: host.call(StandbyRequest(instance=OAK)),
            {OAK: _may(_RUNNING, _STANDBY)},
            memory=OAK,
            disk=OAK,
            end=_STANDBY,
            steps=46,
            seconds=0.3,
        ),
        Operation(
            "restore",
            _standby,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING)},
            end=_RUNNING,
            steps=28,
            seconds=0.25,
        ),
        Operation(
            "restore-on-layers",
            _on_layers,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING)},
            memory=OAK,
            disk=OAK,
            end=_RUNNING,
            steps=60,
            seconds=0.3,
        ),
        Operation(
            "restore-on-a-shared-disk",
            _forked,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING), "elm": _may(_STANDBY)},
            memory=OAK,
            disk=OAK,
            end=_RUNNING,
            steps=70,
            seconds=0.3,
        ),
        Operation(
            "restore-that-merges-disk-layers",
            _forked_often,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING), "elm": _may(_STANDBY)},
            memory=OAK,
            disk=OAK,
            end=_RUNNING,
            steps=80,
            seconds=0.4,
        ),
        Operation(
            "fork-from-running-on-layers",
            _running_on_layers,
            lambda host, _: host.call(ForkRequest(instance=OAK, names=["elm"], from_running=True)),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            memory=OAK,
            disk=OAK,
            steps=120,
            seconds=0.9,
        ),
        Operation(
            "standby-that-merges-layers",
            _on_all_layers,
            lambda host, _: host.call(StandbyRequest(instance=OAK)),
            {OAK: _may(_RUNNING, _STANDBY)},
            memory=OAK,
            disk=OAK,
            end=_STANDBY,
            steps=60,
            seconds=0.4,
        ),
        Operation(
            "promote",
            _standby,
            lambda host, _: host.call(PromoteRequest(instance=OAK)),
            {OAK: _may(_STANDBY, State.TEMPLATE)},
            end=State.TEMPLATE,
            steps=3,
            seconds=0.05,
        ),
        Operation(
            "demote",
            _template,
            lambda host, _: host.call(DemoteRequest(instance=OAK)),
            {OAK: _may(State.TEMPLATE, _STANDBY)},
            end=_STANDBY,
            steps=3,
            seconds=0.05,
        ),
        Operation(
            "stop",
            running,
            lambda host, _: host.call(StopRequest(instance=OAK)),
            {OAK: _may(_RUNNING, _STOPPED)},
            memory=OAK,
            disk=OAK,
            end=_STOPPED,
            steps=23,
            seconds=0.25,
        ),
        Operation(
            "rm",
            running,
            lambda host, _: host.call(RmRequest(instance=OAK)),
            {OAK: _may(_RUNNING, None)},
            memory=OAK,
            disk=OAK,
            removes=True,
            steps=29,
            seconds=0.1,
        ),
        Operation(
            "snapshot-create",
            running,
            lambda host, _: host.call(SnapshotRequest(instance=OAK, name="twig")),
            {OAK: _may(_RUNNING)},
            may_have=frozenset({"twig"}),
            memory=OAK,
            disk=OAK,
            steps=57,
            seconds=0.5,
        ),
        Operation(
            "snapshot-of-standby",
            _standby,
            lambda host, _: host.call(SnapshotRequest(instance=OAK, name="twig")),
            {OAK: _may(_STANDBY)},
            may_have=frozenset({"twig"}),
            steps=14,
            seconds=0.15,
        ),
        Operation(
            "snapshot-restore",
            _with_snapshot,
            lambda host, _: host.call(SnapshotRestoreRequest(snapshot="twig")),
            {OAK: _may(_RUNNING, _STANDBY)},
            snapshots=frozenset({"twig"}),
            memory=OAK,
            disk=OAK,
            end=_STANDBY,
            steps=39,
            seconds=0.15,
        ),
        Operation(
            "snapshot-fork",
            nothing,
            lambda host, _: host.call(SnapshotForkRequest(snapshot=SEED, names=[OAK])),
            {OAK: _may(_RUNNING, None)},
            steps=38,
            seconds=0.35,
        ),
        Operation(
            "snapshot-rm",
            _twig,
            lambda host, _: host.snapshots.rm("twig"),
            {},
            may_have=frozenset({"twig"}),
            removes=True,
            steps=12,
            seconds=0.1,
        ),
        Operation("volume-create", nothing, _sap, {}, may_have_volumes=frozenset({SAP}), steps=10, seconds=0.1),
        Operation(
            "volume-create-from-archive",
            _archive,
            lambda host, _: host.volumes.create(SAP, size_bytes=VOLUME, archive=_archive_of(host)),
            {},
            may_have_volumes=frozenset({SAP}),
            repeatable=False,  # the archive that was sent is lost with the server
            steps=20,
            seconds=0.3,
        ),
        Operation(
            "volume-rm",
            _sap,
            lambda host, _: host.volumes.rm(SAP),
            {},
            may_have_volumes=frozenset({SAP}),
            removes=True,
            steps=6,
            seconds=0.05,
        ),
        Operation(
            "import",
            _exported,
            lambda host, _: host.call(ImportTemplateRequest(path=str(_export_of(host)), name=OAK)),
            {OAK: _may(State.TEMPLATE, None)},
            repeatable=False,  # the archive that was sent is lost with the server
            steps=40,
            seconds=0.5,
        ),
        Operation(
            "run", nothing, boot, {OAK: _may(_RUNNING, None)}, memory="", disk="", boots=True, steps=45, seconds=0.2
        ),
        Operation(
            "start",
            _stopped,
            lambda host, _: host.call(StartRequest(instance=OAK)),
            {OAK: _may(_STOPPED, _RUNNING)},
            memory="",
            boots=True,
            end=_RUNNING,
            steps=40,
            seconds=0.2,
        ),
        Operation(
            "run-with-volume",
            _sap,
            _drink,
            {OAK: _may(_RUNNING, None)},
            volumes=frozenset({SAP}),
            memory="",
            disk="",
            boots=True,
            steps=50,
            seconds=0.2,
        ),
        Operation(
            "rm-with-volume",
            _drinking,
            lambda host, _: host.call(RmRequest(instance=OAK)),
            {OAK: _may(_RUNNING, None)},
            volumes=frozenset({SAP}),
            memory=OAK,
            disk=OAK,
            boots=True,
            removes=True,
            steps=40,
            seconds=0.2,
        ),
        Operation(
            "fork-from-first-boot",
            _booted,
            lambda host, _: host.call(ForkRequest(instance=OAK, names=["elm"], from_running=True)),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            boots=True,
            memory=OAK,
            disk=OAK,
            steps=90,
            seconds=0.2,
        ),
    )
}
