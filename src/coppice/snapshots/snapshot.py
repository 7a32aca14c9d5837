"""Snapshots: named states of an instance, each in its own directory.

A snapshot has its own links to mem-file, vmstate and image root, and its own clone of the overlay
disk, all read-only. So it outlives its source, and removing it does not affect its forks. While it
is made or removed, the journal has a row for it, and lookups skip it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from coppice.completion import in_thread
from coppice.errors import IllegalTransition, UsageError
from coppice.linux.files import os_errors
from coppice.machine import directory as directories
from coppice.machine import disk, disks, live
from coppice.machine.rooms import Rooms
from coppice.model import Instance, Snapshot, SnapshotKind, State
from coppice.names import new_id
from coppice.state import locks
from coppice.vmm import driver as files


def new_snapshot(source: Instance, name: str, kind: SnapshotKind | None, tags: Mapping[str, str]) -> Snapshot:
    """Return the record of a new snapshot.

    Without a `kind` it includes the memory, if there is any.

    :raises UsageError: there is no such kind
    :raises IllegalTransition: a Standby snapshot of a Stopped instance is requested
    """
    if kind not in (None, *SnapshotKind):
        raise UsageError(f"a snapshot cannot be {kind!r}", hint=f"use {' or '.join(SnapshotKind)}")
    stopped = source.state is State.STOPPED
    if stopped and kind is SnapshotKind.STANDBY:
        raise IllegalTransition(
            f"{source.name} is Stopped: it has no memory for a Standby snapshot",
            hint="use `--kind stopped`, or start the instance",
        )
    return Snapshot(
        id=new_id(),
        name=name,
        kind=kind or (SnapshotKind.STOPPED if stopped else SnapshotKind.STANDBY),
        source=source.id,
        source_name=source.name,
        created_at=time.time(),
        driver=source.driver,
        image=source.image,
        image_name=source.image_name,
        machine=source.machine,
        process=source.process,
        tags=dict(tags),
        disk_layers=source.disk_layers,
        egress=source.egress,
        limits=source.limits,
        identified=source.identified,
        owner=source.owner,
        public=source.public,
    )


def as_source(snapshot: Snapshot) -> Instance:
    """Return the snapshot as an instance that can be forked: Standby with its memory, or Stopped
    with its disk alone.
    """
    return Instance(
        id=snapshot.id,
        name=snapshot.name,
        state=State(snapshot.kind),
        created_at=snapshot.created_at,
        driver=snapshot.driver,
        image=snapshot.image,
        image_name=snapshot.image_name,
        machine=snapshot.machine,
        process=snapshot.process,
        hostname=snapshot.name,
        egress=snapshot.egress,
        limits=snapshot.limits,
        capture=snapshot.capture,
        disk_layers=snapshot.disk_layers,
        owner=snapshot.owner,
        public=snapshot.public,
    )


async def create(rooms: Rooms, source: Instance, snapshot: Snapshot) -> Snapshot:
    """Fill a recorded snapshot from its source, and finish its record.

    The caller holds both locks, and removes the snapshot if this fails. A running source is paused,
    and resumed in every case.

    :raises IntegrityError: the source's files have changed since their capture
    :raises VmmError: the VMM refused
    :raises NoSpace: the disk is full
    """
    directory = rooms.layout.snapshot(snapshot.id)
    await in_thread(directories.create, directory)
    if source.state is not State.RUNNING:
        whole = await in_thread(_fill, rooms, rooms.directory(source.id), source, snapshot)
    elif snapshot.kind is SnapshotKind.STOPPED:
        layers, pause_ms = await live.take_disk(rooms, source, directory)
        snapshot = msgspec.structs.replace(snapshot, disk_layers=layers)
        whole = await in_thread(_fill, rooms, rooms.directory(source.id), source, snapshot)
        whole = msgspec.structs.replace(whole, pause_ms=pause_ms)
    else:
        whole = await _create_of_memory(rooms, source, snapshot)
    await in_thread(rooms.store.snapshots.finish, whole)
    return whole


async def _create_of_memory(rooms: Rooms, source: Instance, snapshot: Snapshot) -> Snapshot:
    async with live.stem(rooms, source) as stem:
        captured, report = await live.capture_running(rooms, source, stem)
        snapshot = msgspec.structs.replace(snapshot, disk_layers=captured.disk_layers)
        whole = await in_thread(_take_over, rooms, captured, snapshot)
    return msgspec.structs.replace(whole, pause_ms=report.pause_ms)


@os_errors("move the disk of a capture")
def _take_over(rooms: Rooms, stem: Instance, snapshot: Snapshot) -> Snapshot:
    """Fill a snapshot from a stem.

    Only the stem uses its disks, so they are moved, not copied.
    """
    origin = rooms.directory(stem.id)
    for path in disks.paths(origin, disks.of(stem)):
        path.rename(rooms.layout.snapshot(snapshot.id) / path.name)
    return _fill(rooms, rooms.directory(stem.id), stem, snapshot)


def _fill(rooms: Rooms, origin: Path, source: Instance, snapshot: Snapshot) -> Snapshot:
    """Place all files of a snapshot durably, and its disk unless it is already there; return the
    complete record.
    """
    directory = rooms.layout.snapshot(snapshot.id)
    with_memory = snapshot.kind is SnapshotKind.STANDBY
    if not directories.exists(directory):
        if with_memory:
            directories.require_current(origin, source)
        for each in disks.of(source):
            disk.share(origin, directory, each, rooms.driver(source))
    placed = directories.place_capture(
        origin,
        directory,
        source,
        with_memory=with_memory,
        able=rooms.driver(source).capabilities,
    )
    with os_errors(f"make the snapshot {directory} durable"):
        for path in disks.paths(directory, disks.of(snapshot)):
            disk.freeze(path)
        present = directories.sync_captured(directory, snapshot.machine)
        capture = placed.capture
        if capture is not None:
            digest = hashlib.sha256((directory / files.VMSTATE).read_bytes()).hexdigest()
            capture = msgspec.structs.replace(capture, vmstate_sha256=digest)
        return msgspec.structs.replace(
            snapshot,
            capture=capture,
            disk_stamp=directories.disk_stamp(directory, snapshot.disk_layers),
            size_bytes=sum(path.stat().st_blocks * 512 for path in present),
        )


async def remove(rooms: Rooms, snapshot_id: str) -> None:
    """Remove a snapshot with its files and its record.

    Idempotent. The caller holds its lock, or is the only one that knows its id.
    """
    await in_thread(directories.remove, rooms.layout.snapshot(snapshot_id))
    await in_thread(rooms.store.snapshots.forget, snapshot_id)
    locks.remove(rooms.layout.lock(snapshot_id))
