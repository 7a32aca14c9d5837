"""The operations that a host process is killed in: what is there before, what it does, and what may be there after.

`oak` is the machine that something happens to, `stump` the template that all come from. What an operation may leave is part of what it promises:
each new machine is whole or absent, and each old one is as it was, or as it was to become.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from coppice.host import AsyncHost
from coppice.model import MIB, State, VolumeMount

STUMP, OAK, SAP = "stump", "oak", "sap"
MEMORY, DISK, VOLUME = 192 * MIB, 256 * MIB, 32 * MIB
SEED = "seed"  # a snapshot of the stump that is always there

Act = Callable[[AsyncHost], Awaitable[object]]
States = frozenset[State | None]
"""States that a machine may be found in; None: it is not there."""


@dataclass(frozen=True)
class Operation:
    """One operation of a host process that is going to be killed."""

    name: str
    prepare: Act
    act: Act
    after: dict[str, States]  # by name, of all instances but the stump
    snapshots: frozenset[str] = frozenset()  # that are there before and after
    may_have: frozenset[str] = frozenset()  # snapshots that may be there after
    volumes: frozenset[str] = frozenset()  # that are there before and after
    may_have_volumes: frozenset[str] = frozenset()
    memory: str = STUMP  # what the memory of its machines knows
    disk: str = STUMP
    boots: bool = False  # takes seconds
    steps: int = 0  # about so many, and seconds: where they have not been measured
    seconds: float = 0.0


def _may(*states: State | None) -> States:
    return frozenset(states)


async def nothing(host: AsyncHost) -> None:
    """Nothing has to be there before."""


async def running(host: AsyncHost) -> None:
    """A Running oak, whose memory and disk know something that the stump's do not."""
    await host.fork(STUMP, names=[OAK], atomic=True)
    await learn(host, OAK)


async def learn(host: AsyncHost, name: str) -> None:
    """Write the machine's name into its memory and onto its disk."""
    script = f"echo {name} >/run/own; echo {name} >/root/own; sync /root/own"
    assert (await host.exec(name, ["sh", "-c", script], timeout_s=60)).exit_code == 0


async def _booted(host: AsyncHost) -> None:
    await boot(host)
    await learn(host, OAK)


async def boot(host: AsyncHost, *volumes: str) -> None:
    """A Running oak of an image, that writes to some volumes."""
    (image,) = {vm.image for vm in await host.ls() if vm.name == STUMP}
    mounts = [VolumeMount(volume=name, mount_path=f"/srv/{name}") for name in volumes]
    await host.run(image, ["sleep", "infinity"], name=OAK, memory_bytes=MEMORY, overlay_bytes=DISK, volumes=mounts)


async def _standby(host: AsyncHost) -> None:
    await host.fork(STUMP, names=[OAK], target=State.STANDBY, atomic=True)


async def _ahead(host: AsyncHost) -> None:
    await host.start_ahead(STUMP)
    (result,) = (await host.fork(STUMP, names=[OAK])).results
    assert result.started_ahead


async def _stopped(host: AsyncHost) -> None:
    await host.fork(STUMP, names=[OAK], target=State.STOPPED, atomic=True)


async def _template(host: AsyncHost) -> None:
    await _standby(host)
    await host.promote(OAK)


async def _with_snapshot(host: AsyncHost) -> None:
    await running(host)
    await host.snapshot_create(OAK, name="twig")


async def _twig(host: AsyncHost) -> None:
    await host.snapshot_create(STUMP, name="twig")


async def _sap(host: AsyncHost) -> None:
    await host.volume_create(SAP, size_bytes=VOLUME)


async def _archive(host: AsyncHost) -> None:
    with tarfile.open(_archive_of(host), "w") as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"rings/{number}")
            member.size = 64 << 10
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))


def _archive_of(host: AsyncHost) -> Path:
    return host.rooms.layout.home.parent / "sap.tar"


async def _drink(host: AsyncHost) -> None:
    await boot(host, SAP)


async def _drinking(host: AsyncHost) -> None:
    await _sap(host)
    await _drink(host)
    await learn(host, OAK)


_RUNNING, _STANDBY, _STOPPED = State.RUNNING, State.STANDBY, State.STOPPED

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "fork",
            nothing,
            lambda host: host.fork(STUMP, names=[OAK]),
            {OAK: _may(_RUNNING, None)},
            steps=38,
            seconds=0.35,
        ),
        Operation(
            "fork-started-ahead",
            nothing,
            _ahead,
            {OAK: _may(_RUNNING, None)},
            steps=60,
            seconds=0.5,
        ),
        Operation(
            "fan-out",
            nothing,
            lambda host: host.fork(STUMP, names=[OAK], count=3),
            {f"{OAK}-{number}": _may(_RUNNING, None) for number in (1, 2, 3)},
            steps=108,
            seconds=0.8,
        ),
        Operation("fork-to-standby", nothing, _standby, {OAK: _may(_STANDBY, None)}, steps=15, seconds=0.06),
        Operation(
            "fork-from-running",
            running,
            lambda host: host.fork(OAK, names=["elm"], from_running=True),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            memory=OAK,
            disk=OAK,
            steps=84,
            seconds=0.8,
        ),
        Operation(
            "standby",
            running,
            lambda host: host.standby(OAK),
            {OAK: _may(_RUNNING, _STANDBY)},
            memory=OAK,
            disk=OAK,
            steps=46,
            seconds=0.3,
        ),
        Operation(
            "restore", _standby, lambda host: host.restore(OAK), {OAK: _may(_STANDBY, _RUNNING)}, steps=28, seconds=0.25
        ),
        Operation(
            "promote",
            _standby,
            lambda host: host.promote(OAK),
            {OAK: _may(_STANDBY, State.TEMPLATE)},
            steps=3,
            seconds=0.05,
        ),
        Operation(
            "demote",
            _template,
            lambda host: host.demote(OAK),
            {OAK: _may(State.TEMPLATE, _STANDBY)},
            steps=3,
            seconds=0.05,
        ),
        Operation(
            "stop",
            running,
            lambda host: host.stop(OAK),
            {OAK: _may(_RUNNING, _STOPPED)},
            memory=OAK,
            disk=OAK,
            steps=23,
            seconds=0.25,
        ),
        Operation(
            "rm",
            running,
            lambda host: host.rm(OAK),
            {OAK: _may(_RUNNING, None)},
            memory=OAK,
            disk=OAK,
            steps=29,
            seconds=0.1,
        ),
        Operation(
            "snapshot-create",
            running,
            lambda host: host.snapshot_create(OAK, name="twig"),
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
            lambda host: host.snapshot_create(OAK, name="twig"),
            {OAK: _may(_STANDBY)},
            may_have=frozenset({"twig"}),
            steps=14,
            seconds=0.15,
        ),
        Operation(
            "snapshot-restore",
            _with_snapshot,
            lambda host: host.snapshot_restore("twig"),
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
            lambda host: host.snapshot_fork(SEED, names=[OAK]),
            {OAK: _may(_RUNNING, None)},
            steps=38,
            seconds=0.35,
        ),
        Operation(
            "snapshot-rm",
            _twig,
            lambda host: host.snapshot_rm("twig"),
            {},
            may_have=frozenset({"twig"}),
            steps=12,
            seconds=0.1,
        ),
        Operation("volume-create", nothing, _sap, {}, may_have_volumes=frozenset({SAP}), steps=10, seconds=0.1),
        Operation(
            "volume-create-from-archive",
            _archive,
            lambda host: host.volume_create(SAP, size_bytes=VOLUME, archive=_archive_of(host)),
            {},
            may_have_volumes=frozenset({SAP}),
            steps=20,
            seconds=0.3,
        ),
        Operation(
            "volume-rm",
            _sap,
            lambda host: host.volume_rm(SAP),
            {},
            may_have_volumes=frozenset({SAP}),
            steps=6,
            seconds=0.05,
        ),
        Operation("run", nothing, boot, {OAK: _may(_RUNNING, None)}, memory="", disk="", boots=True),
        Operation(
            "start", _stopped, lambda host: host.start(OAK), {OAK: _may(_STOPPED, _RUNNING)}, memory="", boots=True
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
        ),
        Operation(
            "rm-with-volume",
            _drinking,
            lambda host: host.rm(OAK),
            {OAK: _may(_RUNNING, None)},
            volumes=frozenset({SAP}),
            memory=OAK,
            disk=OAK,
            boots=True,
        ),
        Operation(
            "fork-from-first-boot",
            _booted,
            lambda host: host.fork(OAK, names=["elm"], from_running=True),
            {OAK: _may(_RUNNING), "elm": _may(_RUNNING, None)},
            boots=True,
            memory=OAK,
            disk=OAK,
        ),
    )
}
