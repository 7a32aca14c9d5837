"""Snapshots: named moments of an instance, in directories of their own.

A snapshot has its own links to mem-file, vmstate and image root, and its own clone of the overlay disk, all of them read-only. So it outlives its source, and
removing it does not touch what was forked from it. While it is made or removed the journal has a row for it, and nobody finds it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from coppice.completion import in_thread
from coppice.disk.atomic import os_errors
from coppice.disk.clone import clone_file
from coppice.disk.link import IMMUTABLE
from coppice.errors import IllegalTransition
from coppice.instance import directory as directories
from coppice.instance import live
from coppice.instance.rooms import Rooms
from coppice.model import Instance, Snapshot, SnapshotKind, State
from coppice.names import new_id
from coppice.vmm import driver as files

OPERATION = "snapshot"  # journal of a snapshot that is not whole yet
REMOVAL = "snapshot-rm"  # journal of one that is going


def new_snapshot(source: Instance, name: str, kind: SnapshotKind | None, tags: Mapping[str, str]) -> Snapshot:
    """The record of a snapshot that is to be made. Without a `kind` it is of the memory too, where there is any.

    :raises IllegalTransition: the memory of a Stopped instance is asked for
    """
    stopped = source.state is State.STOPPED
    if stopped and kind is SnapshotKind.STANDBY:
        raise IllegalTransition(
            f"{source.name} is Stopped: it has no memory for a Standby snapshot", hint="make a Stopped one, or start it"
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
        identified=source.identified,
        identity_serial=source.identity_serial,
        owner=source.owner,
        public=source.public,
    )


def as_source(snapshot: Snapshot) -> Instance:
    """The snapshot as an instance that can be forked: Standby with its memory, Stopped with its disk alone."""
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
        mem_file=snapshot.mem_file,
        manifest=snapshot.manifest,
        captured_at=snapshot.captured_at,
        disk_stamp=snapshot.disk_stamp,
        open_ports=snapshot.open_ports,
        frozen=snapshot.frozen,
        identity_serial=snapshot.identity_serial,
        owner=snapshot.owner,
        public=snapshot.public,
    )


async def create(rooms: Rooms, source: Instance, snapshot: Snapshot) -> Snapshot:
    """Fill a recorded snapshot from its source, and finish its record. The caller holds both, and removes the snapshot if this fails.

    A source that runs is paused for some milliseconds, and runs on in every case.

    :raises IntegrityError: the source's capture is not what was captured
    :raises VmmError: the VMM refused
    :raises NoSpace: the disk is full
    """
    directory = rooms.layout.snapshot(snapshot.id)
    await in_thread(directories.create, directory)
    if source.state is not State.RUNNING:
        whole = await in_thread(_fill, rooms, rooms.directory(source.id), source, snapshot)
    elif snapshot.kind is SnapshotKind.STOPPED:
        pause_ms = await live.copy_disk(rooms, source, directory)
        whole = await in_thread(_fill, rooms, rooms.directory(source.id), source, snapshot)
        whole = msgspec.structs.replace(whole, pause_ms=pause_ms)
    else:
        whole = await _create_of_memory(rooms, source, snapshot)
    await in_thread(rooms.store.snapshots.finish, whole)
    await in_thread(rooms.store.sync)
    return whole


async def _create_of_memory(rooms: Rooms, source: Instance, snapshot: Snapshot) -> Snapshot:
    stem = live.new_stem(source)
    try:
        await in_thread(rooms.store.create, [stem], live.MAKING)
        captured, report = await live.capture_running(rooms, source, stem)
        whole = await in_thread(_take_over, rooms, captured, snapshot)
    finally:
        await live.remove_stem(rooms, stem)
    return msgspec.structs.replace(whole, pause_ms=report.pause_ms)


def _take_over(rooms: Rooms, stem: Instance, snapshot: Snapshot) -> Snapshot:
    """The stem's disk is nobody else's: it becomes the snapshot's, without another copy."""
    disk = rooms.directory(stem.id) / files.OVERLAY_DISK
    disk.rename(rooms.layout.snapshot(snapshot.id) / files.OVERLAY_DISK)
    return _fill(rooms, rooms.directory(stem.id), stem, snapshot)


def _fill(rooms: Rooms, origin: Path, source: Instance, snapshot: Snapshot) -> Snapshot:
    """Place all files of a snapshot, durably; its disk, unless it has it already. Return its record, whole."""
    directory = rooms.layout.snapshot(snapshot.id)
    with_memory = snapshot.kind is SnapshotKind.STANDBY
    disk = directory / files.OVERLAY_DISK
    if not disk.exists():
        if with_memory:
            directories.require_current(origin, source)
        clone_file(origin / files.OVERLAY_DISK, disk, sync=False)
    placed = directories.place_capture(
        origin,
        directory,
        source,
        with_memory=with_memory,
        shareable=rooms.driver.capabilities.maps_mem_file_privately,
    )
    vmstate = directory / files.VMSTATE
    with os_errors(f"make the snapshot {directory} durable"):
        disk.chmod(IMMUTABLE)
        present = directories.sync_captured(directory)
        whole = msgspec.structs.replace(
            snapshot,
            disk_stamp=directories.disk_stamp(directory),
            size_bytes=sum(path.stat().st_blocks * 512 for path in present),
        )
        if not with_memory:
            return whole
        return msgspec.structs.replace(
            whole,
            mem_file=placed.mem_file,
            vmstate_sha256=hashlib.sha256(vmstate.read_bytes()).hexdigest(),
            manifest=source.manifest,
            captured_at=source.captured_at,
            open_ports=source.open_ports,
            frozen=source.frozen,
        )


async def remove(rooms: Rooms, snapshot_id: str) -> None:
    """Remove a snapshot and all that is its own. Idempotent; the caller holds its lock, or is alone in knowing it."""
    await in_thread(directories.remove, rooms.layout.snapshot(snapshot_id))
    await in_thread(rooms.store.snapshots.forget, snapshot_id)
    rooms.layout.lock(snapshot_id).unlink(missing_ok=True)
