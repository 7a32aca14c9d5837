"""The operations in which host processes are killed: the state before, the call, and the states
allowed afterwards.

The operation changes the machine `oak`. `stump` is the template of all machines. After a kill each
new machine is complete or absent, and each old machine is in the state before or after the
operation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coppice.client import AsyncHost
from coppice.model import SnapshotKind, State
from coppice.requests import (
    DemoteRequest,
    ForkRequest,
    ImportTemplateRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from crash.kinds import Kind
from crash.states import (
    OAK,
    SAP,
    STUMP,
    VOLUME,
    archive,
    archive_of,
    boot,
    booted,
    drink,
    drinking,
    export_of,
    exported,
    fork_ahead,
    forked,
    forked_often,
    nothing,
    on_all_layers,
    on_layers,
    running,
    running_on_all_disk_layers,
    running_on_layers,
    sap,
    standby,
    stopped,
    template,
    twig,
    with_snapshot,
)

SEED = "seed"  # a snapshot of the stump that always exists

Act = Callable[[AsyncHost, Kind], Awaitable[object]]
States = frozenset[State | None]
"""States that a machine may be found in; None: it does not exist."""


@dataclass(frozen=True)
class Operation:
    """One operation of a host process that will be killed."""

    name: str
    prepare: Act
    act: Act
    after: dict[str, States]  # allowed states by name, of all instances except the stump
    snapshots: frozenset[str] = frozenset()  # exist before and after
    may_have: frozenset[str] = frozenset()  # snapshots that may exist afterwards
    volumes: frozenset[str] = frozenset()  # exist before and after
    may_have_volumes: frozenset[str] = frozenset()
    memory: str = STUMP  # the text in its machines' memory
    disk: str = STUMP
    boots: bool = False  # takes seconds with a real machine
    steps: int = 0  # estimates of the steps and seconds, for runs that do not measure them
    seconds: float = 0.0


def _may(*states: State | None) -> States:
    return frozenset(states)


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
            fork_ahead,
            {OAK: _may(_RUNNING, None)},
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
        Operation("fork-to-standby", nothing, standby, {OAK: _may(_STANDBY, None)}, steps=15, seconds=0.06),
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
            steps=46,
            seconds=0.3,
        ),
        Operation(
            "restore",
            standby,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING)},
            steps=28,
            seconds=0.25,
        ),
        Operation(
            "restore-on-layers",
            on_layers,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING)},
            memory=OAK,
            disk=OAK,
            steps=60,
            seconds=0.3,
        ),
        Operation(
            "restore-on-a-shared-disk",
            forked,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING), "elm": _may(_STANDBY)},
            memory=OAK,
            disk=OAK,
            steps=70,
            seconds=0.3,
        ),
        Operation(
            "restore-that-merges-disk-layers",
            forked_often,
            lambda host, _: host.call(RestoreRequest(instance=OAK)),
            {OAK: _may(_STANDBY, _RUNNING), "elm": _may(_STANDBY)},
            memory=OAK,
            disk=OAK,
            steps=80,
            seconds=0.4,
        ),
        Operation(
            "fork-from-running-on-layers",
            running_on_layers,
            lambda host, _: host.call(ForkRequest(instance=OAK, names=["elm"], from_running=True)),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            memory=OAK,
            disk=OAK,
            steps=120,
            seconds=0.9,
        ),
        Operation(
            "fork-from-running-that-merges-disk-layers",
            running_on_all_disk_layers,
            lambda host, _: host.call(ForkRequest(instance=OAK, names=["elm"], from_running=True)),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            memory=OAK,
            disk=OAK,
            steps=140,
            seconds=1.0,
        ),
        Operation(
            "snapshot-of-a-running-disk",
            running,
            lambda host, _: host.call(SnapshotRequest(instance=OAK, name="twig", kind=SnapshotKind.STOPPED)),
            {OAK: _may(_RUNNING)},
            may_have=frozenset({"twig"}),
            memory=OAK,
            disk=OAK,
            steps=50,
            seconds=0.4,
        ),
        Operation(
            "standby-that-merges-layers",
            on_all_layers,
            lambda host, _: host.call(StandbyRequest(instance=OAK)),
            {OAK: _may(_RUNNING, _STANDBY)},
            memory=OAK,
            disk=OAK,
            steps=60,
            seconds=0.4,
        ),
        Operation(
            "promote",
            standby,
            lambda host, _: host.call(PromoteRequest(instance=OAK)),
            {OAK: _may(_STANDBY, State.TEMPLATE)},
            steps=3,
            seconds=0.05,
        ),
        Operation(
            "demote",
            template,
            lambda host, _: host.call(DemoteRequest(instance=OAK)),
            {OAK: _may(State.TEMPLATE, _STANDBY)},
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
            standby,
            lambda host, _: host.call(SnapshotRequest(instance=OAK, name="twig")),
            {OAK: _may(_STANDBY)},
            may_have=frozenset({"twig"}),
            steps=14,
            seconds=0.15,
        ),
        Operation(
            "snapshot-restore",
            with_snapshot,
            lambda host, _: host.call(SnapshotRestoreRequest(snapshot="twig")),
            {OAK: _may(_RUNNING, _STANDBY)},
            snapshots=frozenset({"twig"}),
            memory=OAK,
            disk=OAK,
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
            twig,
            lambda host, _: host.snapshots.rm("twig"),
            {},
            may_have=frozenset({"twig"}),
            steps=12,
            seconds=0.1,
        ),
        Operation("volume-create", nothing, sap, {}, may_have_volumes=frozenset({SAP}), steps=10, seconds=0.1),
        Operation(
            "volume-create-from-archive",
            archive,
            lambda host, _: host.volumes.create(SAP, size_bytes=VOLUME, archive=archive_of(host)),
            {},
            may_have_volumes=frozenset({SAP}),
            steps=20,
            seconds=0.3,
        ),
        Operation(
            "volume-rm",
            sap,
            lambda host, _: host.volumes.rm(SAP),
            {},
            may_have_volumes=frozenset({SAP}),
            steps=6,
            seconds=0.05,
        ),
        Operation(
            "import",
            exported,
            lambda host, _: host.call(ImportTemplateRequest(path=str(export_of(host)), name=OAK)),
            {OAK: _may(State.TEMPLATE, None)},
            steps=40,
            seconds=0.5,
        ),
        Operation(
            "run", nothing, boot, {OAK: _may(_RUNNING, None)}, memory="", disk="", boots=True, steps=45, seconds=0.2
        ),
        Operation(
            "start",
            stopped,
            lambda host, _: host.call(StartRequest(instance=OAK)),
            {OAK: _may(_STOPPED, _RUNNING)},
            memory="",
            boots=True,
            steps=40,
            seconds=0.2,
        ),
        Operation(
            "run-with-volume",
            sap,
            drink,
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
            drinking,
            lambda host, _: host.call(RmRequest(instance=OAK)),
            {OAK: _may(_RUNNING, None)},
            volumes=frozenset({SAP}),
            memory=OAK,
            disk=OAK,
            boots=True,
            steps=40,
            seconds=0.2,
        ),
        Operation(
            "fork-with-a-clone-of-a-volume",
            drinking,
            lambda host, _: host.call(
                ForkRequest(instance=OAK, names=["elm"], from_running=True, volume_policy="clone")
            ),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            volumes=frozenset({SAP}),
            memory=OAK,
            disk=OAK,
            boots=True,
            steps=100,
            seconds=0.9,
        ),
        Operation(
            "fork-from-first-boot",
            booted,
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
