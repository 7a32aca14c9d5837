"""Verify that captured files have not changed since their capture.

Mem-files are checked by SHA-256, size, inode and mode; disks by e2fsck, and by SHA-256 if they
never change. A SHA-256 that `digests` has not computed yet is computed and recorded. A mem-file is
read once for all instances with a link to it, without a lock: holders that changed or are gone at
the end are skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from coppice.completion import in_own_thread, in_thread
from coppice.errors import HostCannot, IntegrityError, MissingTool, NoSpace, NotFound
from coppice.integrity import digests
from coppice.integrity.digests import Holder
from coppice.linux.tool import NotFinished
from coppice.machine import directory as directories
from coppice.machine import disk, disks, volumes
from coppice.machine.rooms import Rooms
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
from coppice.state import locks
from coppice.vmm import driver as files
from coppice.vmm.driver import VmmDriver
from coppice.volumes.ext4 import fsck

_RECORD_WITHIN_S = 5.0  # a hash that cannot be recorded now is computed again next time


@dataclass
class _Findings:
    """The findings so far."""

    mem_files: int = 0
    disks: int = 0
    bytes_hashed: int = 0
    recorded: int = 0
    skipped: list[str] = field(default_factory=list)
    no_space: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)


class _Link(NamedTuple):
    """One holder's link to a file of a memory."""

    holder: Holder
    path: Path
    recorded: MemFile


async def verify(rooms: Rooms, progress: ProgressSink) -> VerifyReport:
    """Check every captured file of the data directory, and every disk without a running machine,
    volumes included.

    :raises MissingTool: e2fsck is not installed
    """
    holders = await in_thread(digests.holders, rooms.layout, rooms.store)
    found = _Findings()
    sound: dict[tuple[int, int], list[_Link]] = {}
    for holder in holders:
        await _check_vmstate(rooms, holder, found)
        for path, expected in holder.memory:
            if inode := await _in_order(rooms, holder, path, expected, found):
                sound.setdefault(inode, []).append(_Link(holder, path, expected))
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
        no_space=tuple(found.no_space),
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


async def _check_vmstate(rooms: Rooms, holder: Holder, found: _Findings) -> None:
    """Check the device state of a captured memory."""
    vmstate, capture = holder.directory / files.VMSTATE, holder.record.capture
    if capture is None:
        return
    if not vmstate.is_file():
        # A machine that continued after its capture has no vmstate: only its mapping was made private.
        if isinstance(holder.record, Snapshot) or holder.record.vmm is None:
            await _report(rooms, holder, found, files.VMSTATE, "it is missing")
    elif capture.vmstate_sha256 is not None:
        try:
            digest = hashlib.sha256(await in_thread(vmstate.read_bytes)).hexdigest()
        except FileNotFoundError:
            await _report(rooms, holder, found, files.VMSTATE, "it is missing")
            return
        if digest != capture.vmstate_sha256:
            await _report(rooms, holder, found, files.VMSTATE, _hashes(digest, capture.vmstate_sha256))


async def _in_order(
    rooms: Rooms, holder: Holder, path: Path, expected: MemFile, found: _Findings
) -> tuple[int, int] | None:
    """Check a file of the memory; return its device and inode if it is intact."""
    try:
        await in_thread(memfile.check, path, expected)
        status = path.stat()
    except IntegrityError as error:
        await _report(rooms, holder, found, path.name, error.difference or error.message)
        return None
    except FileNotFoundError:
        await _report(rooms, holder, found, path.name, "it is missing")
        return None
    return status.st_dev, status.st_ino


async def _check_memory(rooms: Rooms, links: list[_Link], found: _Findings, progress: ProgressSink) -> None:
    """Hash one mem-file or layer, and compare it with the recorded hash of each holder of a link.

    Holders without a hash use that of another.
    """
    digest = None
    for holder, path, _ in links:
        try:
            digest = await _sha256(path, progress)
            break
        except IntegrityError as error:
            await _report(rooms, holder, found, path.name, error.message)
    if digest is None:
        return
    known = next((file.sha256 for _, _, file in links if file.sha256 is not None), None)
    found.mem_files += 1
    found.bytes_hashed += links[0].recorded.size_bytes
    for holder, path, file in links:
        expected = file.sha256 or known
        if expected is not None and expected != digest:
            await _report(rooms, holder, found, path.name, _hashes(digest, expected))
        elif file.sha256 is None:
            found.recorded += await digests.record(
                rooms.layout, rooms.store, holder.record, file.inode, digest, deadline_s=_RECORD_WITHIN_S
            )


async def _sha256(path: Path, progress: ProgressSink) -> str:
    digest = await in_own_thread(memfile.sha256, path, progress=progress)
    if digest is None:
        raise AssertionError("it was not asked to stop")
    return digest


def _hashes(digest: str, expected: str | None) -> str:
    return f"its SHA-256 is {digest}, not {expected}"


async def _check_disk(rooms: Rooms, holder: Holder, found: _Findings) -> None:
    """Check an instance's disk under its lock, so that the machine cannot be started meanwhile."""
    record = holder.record
    lock = rooms.layout.lock(record.id)
    descriptor = locks.try_lock(lock, shared=True)
    if descriptor is None:
        found.skipped.append(record.name)
        return
    try:
        current, entry = await rooms.store.look_up(record.id)
        if current.vmm is not None or entry is not None:
            found.skipped.append(record.name)
            return
        capture = current.capture
        if capture is not None and not await in_thread(_has_stamp, holder.directory, current):
            found.differences.append(_differs(holder, files.OVERLAY_DISK, "it was modified since the capture"))
        await _check_links(rooms, holder, current, found)
        await _fsck(rooms, holder, current, found)
    except NotFound:
        locks.remove(lock)
    finally:
        locks.release(descriptor)


def _has_stamp(directory: Path, record: Instance | Snapshot) -> bool:
    stamp = record.disk_stamp if isinstance(record, Snapshot) else record.capture and record.capture.disk_stamp
    paths = disks.paths(directory, disks.of(record))
    return all(path.exists() for path in paths) and directories.disk_stamp(directory, record.disk_layers) == stamp


async def _fsck(rooms: Rooms, holder: Holder, current: Instance | Snapshot, found: _Findings) -> None:
    for each in disks.own(current):
        detail = await _fsck_disk(holder.directory, each, rooms.driver(current), current.name, found)
        if detail is not None:
            found.differences.append(_differs(holder, each.files[0], detail))


async def _fsck_disk(directory: Path, of: disk.Disk, driver: VmmDriver, name: str, found: _Findings) -> str | None:
    """Return what is wrong with a writable disk, as `_fsck_file` does. Its layers are read as one file."""
    if not all(path.exists() for path in of.paths(directory)):
        return "it is missing"
    flat = disk.flat(directory, of, driver)
    try:
        path = await in_thread(flat.__enter__)
    except NoSpace:
        found.no_space.append(name)
        return None
    except MissingTool:
        raise
    except HostCannot as error:
        found.disks += 1
        return error.message
    try:
        return await _fsck_file(path, name, found)
    finally:
        await in_thread(flat.__exit__, None, None, None)


async def _fsck_file(path: Path, name: str, found: _Findings) -> str | None:
    """Return what is wrong with the disk of a holder; None if it is sound, or nothing is known."""
    if not path.exists():
        return "it is missing"
    try:
        result = await in_thread(fsck, path)
    except NoSpace:
        found.no_space.append(name)
        return None
    except NotFinished:
        found.skipped.append(name)
        return None
    except MissingTool:
        raise
    except HostCannot as error:  # it is not a file system any more
        found.disks += 1
        return error.message
    found.disks += 1
    if result.clean:
        return None
    lines = result.output.splitlines()
    said = next((line for line in lines if line and not line.startswith(("e2fsck ", "Pass "))), "no reason given")
    return f"e2fsck finds errors: {said}"


async def _check_links(rooms: Rooms, holder: Holder, record: Instance, found: _Findings) -> None:
    """Check that an instance's links are those of the volumes themselves."""
    for number, each in enumerate(record.machine.volumes):
        if each.private:
            continue
        own = holder.directory / files.VOLUME_DISK.format(number)
        if not own.exists():
            found.differences.append(_differs(holder, own.name, "it is missing"))
        elif not await in_thread(_is_same, own, rooms.layout.volume_disk(each.volume_id)):
            found.differences.append(_differs(holder, own.name, f"it is not the volume {each.volume_name}"))


def _is_same(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


async def _check_volume(rooms: Rooms, volume: Volume, found: _Findings) -> None:
    """Check a volume that has no writer.

    The volume is not locked, so attaching and removing it do not wait. Findings are dropped if it
    changed meanwhile.
    """
    with contextlib.suppress(NotFound):  # removed meanwhile
        before = await in_thread(_unwritten, rooms, volume)
        if before is None:
            found.skipped.append(volume.name)
            return
        of, driver = volumes.disk_of(volume), rooms.drivers.named(volume.driver or rooms.drivers.chosen.name)
        detail = await _fsck_disk(rooms.layout.volume(volume.id), of, driver, volume.name, found)
        if detail is not None and await in_thread(_unwritten, rooms, volume) == before:
            found.differences.append(
                Difference(holder="volume", id=volume.id, name=volume.name, file=of.files[0], detail=detail)
            )


def _unwritten(rooms: Rooms, volume: Volume) -> str | None:
    """Return the stamp of a volume's disk, or None while a machine may write to it."""
    current = rooms.store.volumes.get(volume.id)
    if any(not holder.readonly for holder in current.attachments) or current.layers != volume.layers:
        return None
    paths = volumes.disk_of(volume).paths(rooms.layout.volume(volume.id))
    return " ".join(directories.file_stamp(path) if path.exists() else "missing" for path in paths)


async def _check_snapshot_disk(rooms: Rooms, holder: Holder, record: Snapshot, found: _Findings) -> None:
    """Check a snapshot's disk, which never changes, under its lock, so that it is not removed
    meanwhile.
    """
    lock = rooms.layout.lock(record.id)
    descriptor = locks.try_lock(lock, shared=True)
    if descriptor is None:
        found.skipped.append(record.name)
        return
    try:
        current = await in_thread(rooms.store.snapshots.get, record.id)
        before = len(found.differences)
        if not await in_thread(_has_stamp, holder.directory, current):
            found.differences.append(_differs(holder, files.OVERLAY_DISK, "it was replaced or modified"))
        await _fsck(rooms, holder, current, found)
        if len(found.differences) > before:
            return
        paths = disks.paths(holder.directory, disks.of(current))
        digest = digests.of_disk([await _sha256(path, no_progress) for path in paths])
        found.bytes_hashed += sum(path.stat().st_size for path in paths)
        if current.disk_sha256 is None:
            with contextlib.suppress(NoSpace):  # another run records it
                found.recorded += await in_thread(rooms.store.snapshots.record_sha256, record.id, disk=digest)
        elif current.disk_sha256 != digest:
            found.differences.append(_differs(holder, files.OVERLAY_DISK, _hashes(digest, current.disk_sha256)))
    except NotFound:
        locks.remove(lock)
    finally:
        locks.release(descriptor)
