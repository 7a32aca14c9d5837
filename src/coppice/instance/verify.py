"""Are captured files still what was captured? Mem-files by SHA-256, size, inode and mode; disks by e2fsck, and by SHA-256 where they never change.

A SHA-256 that is not known yet, since `digests` has not come to it, is computed and recorded. A mem-file is read once, however many instances have a
link to it, and nothing is locked meanwhile: who has another mem-file or is gone by the end is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

from coppice.completion import in_thread
from coppice.disk.ext4 import NotFinished, fsck
from coppice.errors import HostCannot, IntegrityError, MissingTool, NoSpace, NotFound
from coppice.instance import digests
from coppice.instance import directory as directories
from coppice.instance.digests import Holder
from coppice.instance.rooms import Rooms
from coppice.memory import memfile
from coppice.model import (
    Difference,
    Instance,
    MemFile,
    Progress,
    ProgressSink,
    Snapshot,
    VerifyReport,
    Volume,
    no_progress,
)
from coppice.store import locks
from coppice.vmm import driver as files

_RECORD_WITHIN_S = 5.0  # a hash that cannot be recorded now is computed again the next time


@dataclass
class _Findings:
    """What has been found so far."""

    mem_files: int = 0
    disks: int = 0
    bytes_hashed: int = 0
    recorded: int = 0
    skipped: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)


async def verify(rooms: Rooms, progress: ProgressSink) -> VerifyReport:
    """Check every captured file of the data directory, and every disk that no machine runs on, volumes included.

    :raises MissingTool: e2fsck is not installed
    """
    holders = await in_thread(digests.holders, rooms.layout, rooms.store)
    found = _Findings()
    sound: dict[tuple[int, int], list[Holder]] = {}
    for holder in holders:
        if holder.mem_file is not None and (inode := await _in_order(rooms, holder, holder.mem_file, found)):
            sound.setdefault(inode, []).append(holder)
    for links in sound.values():
        await _check_memory(rooms, links, found, progress)
    for done, holder in enumerate(holders, 1):
        progress(Progress(stage="disks", done=done, total=len(holders)))
        if isinstance(holder.record, Snapshot):
            await _check_snapshot_disk(rooms, holder, holder.record, found)
        else:
            await _check_disk(rooms, holder, found)
    for volume in await in_thread(rooms.store.volumes.all):
        await _check_volume(rooms, volume, found)
    return VerifyReport(
        mem_files=found.mem_files,
        disks=found.disks,
        bytes_hashed=found.bytes_hashed,
        recorded=found.recorded,
        skipped=tuple(found.skipped),
        differences=tuple(found.differences),
    )


def _differs(holder: Holder, file: str, detail: str) -> Difference:
    record = holder.record
    return Difference(
        holder="snapshot" if isinstance(record, Snapshot) else "instance",
        id=record.id,
        name=record.name,
        file=file,
        detail=detail,
    )


async def _report(rooms: Rooms, holder: Holder, found: _Findings, file: str, detail: str) -> None:
    if await in_thread(digests.still_there, rooms.store, holder.record):
        found.differences.append(_differs(holder, file, detail))


async def _in_order(rooms: Rooms, holder: Holder, expected: MemFile, found: _Findings) -> tuple[int, int] | None:
    """Device and inode of the mem-file, if it is the one that was recorded; the device state beside it is checked on the way."""
    vmstate, memory = holder.directory / files.VMSTATE, holder.directory / files.MEMORY
    try:
        if not vmstate.is_file():
            # A machine that runs on after it was captured has none: only its mapping was made private.
            if isinstance(holder.record, Snapshot) or holder.record.vmm is None:
                await _report(rooms, holder, found, files.VMSTATE, "it is missing")
        elif isinstance(holder.record, Snapshot):
            digest = hashlib.sha256(await in_thread(vmstate.read_bytes)).hexdigest()
            if digest != holder.record.vmstate_sha256:
                await _report(rooms, holder, found, files.VMSTATE, _hashes(digest, holder.record.vmstate_sha256))
        await in_thread(memfile.check, memory, expected)
        status = memory.stat()
    except IntegrityError as error:
        await _report(rooms, holder, found, files.MEMORY, error.message.partition("captured: ")[2] or error.message)
        return None
    except FileNotFoundError:
        await _report(rooms, holder, found, files.MEMORY, "it is missing")
        return None
    return status.st_dev, status.st_ino


async def _check_memory(rooms: Rooms, links: list[Holder], found: _Findings, progress: ProgressSink) -> None:
    """Hash one mem-file, and compare it with what each holder of a link to it has recorded, or any other of them."""
    digest = None
    for holder in links:
        try:
            digest = await _sha256(holder.directory / files.MEMORY, progress)
            break
        except IntegrityError as error:
            await _report(rooms, holder, found, files.MEMORY, error.message)
    if digest is None:
        return
    sums = [(holder, holder.mem_file) for holder in links if holder.mem_file is not None]
    known = next((mem_file.sha256 for _, mem_file in sums if mem_file.sha256 is not None), None)
    found.mem_files += 1
    found.bytes_hashed += sums[0][1].size_bytes
    for holder, mem_file in sums:
        expected = mem_file.sha256 or known
        if expected is not None and expected != digest:
            await _report(rooms, holder, found, files.MEMORY, _hashes(digest, expected))
        elif mem_file.sha256 is None:
            found.recorded += await digests.record(
                rooms.layout, rooms.store, holder.record, mem_file.inode, digest, deadline_s=_RECORD_WITHIN_S
            )


async def _sha256(path: Path, progress: ProgressSink) -> str:
    stop = threading.Event()
    try:
        digest = await asyncio.to_thread(memfile.sha256, path, progress=progress, cancelled=stop.is_set)
    finally:
        stop.set()  # a thread cannot be cancelled, but asks
    if digest is None:
        raise AssertionError("it was not asked to stop")
    return digest


def _hashes(digest: str, expected: str | None) -> str:
    return f"its SHA-256 is {digest}, not {expected}"


async def _check_disk(rooms: Rooms, holder: Holder, found: _Findings) -> None:
    """Check an instance's disk while it is held, so that nobody starts the machine meanwhile."""
    record = holder.record
    lock = rooms.layout.lock(record.id)
    descriptor = locks.try_lock(lock, shared=True)
    if descriptor is None:
        found.skipped.append(record.name)
        return
    try:
        current = await in_thread(rooms.store.get, record.id)
        if current.vmm is not None or await in_thread(rooms.store.journal_entry, record.id) is not None:
            found.skipped.append(record.name)
            return
        captured = current.mem_file is not None
        if captured and not await in_thread(_has_stamp, holder.directory, current.disk_stamp):
            found.differences.append(_differs(holder, files.OVERLAY_DISK, "it was written to since the capture"))
        await _check_links(rooms, holder, current, found)
        await _fsck(holder, found)
    except NotFound:
        lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
    finally:
        locks.release(descriptor)


def _has_stamp(directory: Path, stamp: str) -> bool:
    return directories.exists(directory) and directories.disk_stamp(directory) == stamp


async def _fsck(holder: Holder, found: _Findings) -> None:
    detail = await _fsck_file(holder.directory / files.OVERLAY_DISK, holder.record.name, found)
    if detail is not None:
        found.differences.append(_differs(holder, files.OVERLAY_DISK, detail))


async def _fsck_file(disk: Path, name: str, found: _Findings) -> str | None:
    """What is wrong with the disk of a holder; None where nothing is, or nothing is known."""
    if not disk.exists():
        return "it is missing"
    found.disks += 1
    try:
        result = await in_thread(fsck, disk)
    except (MissingTool, NoSpace):
        raise
    except NotFinished:
        found.skipped.append(name)
        return None
    except HostCannot as error:  # it is no file system any more
        return error.message
    if result.clean:
        return None
    lines = result.output.splitlines()
    said = next((line for line in lines if line and not line.startswith(("e2fsck ", "Pass "))), "no reason given")
    return f"e2fsck finds errors: {said}"


async def _check_links(rooms: Rooms, holder: Holder, record: Instance, found: _Findings) -> None:
    """See that what an instance has is the volume itself."""
    for number, disk in enumerate(record.machine.volumes):
        own = holder.directory / files.VOLUME_DISK.format(number)
        if not own.exists():
            found.differences.append(_differs(holder, own.name, "it is missing"))
        elif not await in_thread(_is_same, own, rooms.layout.volume_disk(disk.volume_id)):
            found.differences.append(_differs(holder, own.name, f"it is not the volume {disk.volume_name}"))


def _is_same(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


async def _check_volume(rooms: Rooms, volume: Volume, found: _Findings) -> None:
    """Check a volume that nobody writes to. It is not held, so that nobody waits who attaches or removes it: what is found is then left out."""
    disk = rooms.layout.volume_disk(volume.id)
    with contextlib.suppress(NotFound):  # removed meanwhile
        before = await in_thread(_unwritten, rooms, volume)
        if before is None:
            found.skipped.append(volume.name)
            return
        detail = await _fsck_file(disk, volume.name, found)
        if detail is not None and await in_thread(_unwritten, rooms, volume) == before:
            found.differences.append(
                Difference(holder="volume", id=volume.id, name=volume.name, file=disk.name, detail=detail)
            )


def _unwritten(rooms: Rooms, volume: Volume) -> str | None:
    """Names the content of a volume; None while somebody may write to it."""
    if any(not holder.readonly for holder in rooms.store.volumes.get(volume.id).attachments):
        return None
    disk = rooms.layout.volume_disk(volume.id)
    return directories.file_stamp(disk) if disk.exists() else "missing"


async def _check_snapshot_disk(rooms: Rooms, holder: Holder, record: Snapshot, found: _Findings) -> None:
    """Check a snapshot's disk, which never changes, while it is held, so that nobody removes it."""
    lock = rooms.layout.lock(record.id)
    descriptor = locks.try_lock(lock, shared=True)
    if descriptor is None:
        found.skipped.append(record.name)
        return
    try:
        current = await in_thread(rooms.store.snapshots.get, record.id)
        before = len(found.differences)
        if not await in_thread(_has_stamp, holder.directory, current.disk_stamp):
            found.differences.append(_differs(holder, files.OVERLAY_DISK, "it was replaced or written to"))
        await _fsck(holder, found)
        if len(found.differences) > before:
            return
        digest = await _sha256(holder.directory / files.OVERLAY_DISK, no_progress)
        found.bytes_hashed += current.machine.overlay_bytes
        if current.disk_sha256 is None:
            found.recorded += await in_thread(rooms.store.snapshots.record_sha256, record.id, disk=digest)
        elif current.disk_sha256 != digest:
            found.differences.append(_differs(holder, files.OVERLAY_DISK, _hashes(digest, current.disk_sha256)))
    except NotFound:
        lock.unlink(missing_ok=True)  # removed meanwhile, and taking the lock has made its file again
    finally:
        locks.release(descriptor)
