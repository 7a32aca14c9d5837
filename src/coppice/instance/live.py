"""Capture of a machine that runs on: for `fork --from-running` and for snapshots.

The source is paused only while its devices are saved, its disk is cloned and its memory is made safe; it is resumed in every path. What is captured goes into a
directory of its own, the *stem*: a Standby instance that exists only while the forks take their links from it.

Memory is made safe in one of two ways. A source on a private mapping (a fork, or anything restored) has its private pages collected, in proportion to
their number. A source of first boot writes into its file; its mapping is made private in place, which costs no copy at all: the file is the base from then
on, the stem has a link to it, and the source goes on on a private mapping as a fork would.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

from coppice.completion import complete, in_thread
from coppice.disk.clone import clone_file
from coppice.errors import HostCannot
from coppice.instance import capture, destroy
from coppice.instance import directory as directories
from coppice.instance.activate import require_loadable
from coppice.instance.rooms import Rooms
from coppice.memory import memfile
from coppice.memory.capture import PrivateCapture
from coppice.memory.maps import identify
from coppice.memory.remap import make_private
from coppice.model import CaptureReport, Instance, MemFile, State
from coppice.names import new_id, new_name
from coppice.timing import Stages
from coppice.vmm import driver as files

_log = logging.getLogger(__name__)

OPERATION = "fork-running"  # journal of the source: it is to run on, whatever happens
MAKING = "fork"  # journal of the stem: it is not to outlive the process that makes it


def new_stem(source: Instance) -> Instance:
    """The record of a stem."""
    return msgspec.structs.replace(
        source,
        id=new_id(),
        name=new_name(f"{source.name}-stem"),
        state=State.CREATED,
        created_at=time.time(),
        publish=(),
        vmm=None,
        mem_file=None,
        parent=None,
        parent_name=None,
    )


async def copy_disk(rooms: Rooms, source: Instance, target: Path) -> float:
    """Clone the disk of a Running source, its file system frozen, into the directory `target`; return how long the source was paused, in ms.

    :raises VmmError: the VMM refused; the source runs on
    :raises NoSpace: the disk is full; the source runs on
    """
    directory = rooms.directory(source.id)
    try:
        await in_thread(rooms.store.begin, source, OPERATION)
        source = await capture.freeze_disk(rooms, source)
        begin = time.perf_counter()
        try:
            await rooms.driver.pause(directory)
            await in_thread(_clone_disk, directory, target)
        finally:
            await complete(rooms.driver.resume(directory))
        pause_ms = (time.perf_counter() - begin) * 1000
        await capture.thaw_disk(rooms, source)
        await in_thread(rooms.store.save, msgspec.structs.replace(source, frozen=False), done=True)
    except BaseException:
        await complete(capture.undo(rooms, source))
        raise
    return pause_ms


async def capture_running(rooms: Rooms, source: Instance, stem: Instance) -> tuple[Instance, CaptureReport]:
    """Capture a Running source into the stem's directory; return the stem as Standby. The caller holds the source, and has recorded the stem.

    :raises Refused: it could not be loaded here
    :raises VmmError: the VMM refused; the source runs on
    :raises NoSpace: the disk is full; the source runs on
    """
    vmm = source.vmm
    if vmm is None:
        raise AssertionError("a running instance has a VMM")
    await require_loadable(rooms, source)
    directory, target = rooms.directory(source.id), rooms.directory(stem.id)
    stages = Stages()
    private = None
    try:
        await in_thread(rooms.store.begin, source, OPERATION)
        await in_thread(directories.create, target)
        source = await capture.with_true_base(rooms, source)
        if source.mem_file is not None:
            private = PrivateCapture(directory / files.MEMORY, source.mem_file, target / files.MEMORY)
            with stages.stage("prepare"):
                await in_thread(private.prepare)
                await in_thread(private.collect, vmm.pid)  # its buffers and tables are warm when it counts
        with stages.stage("freeze"):
            source = await capture.freeze_disk(rooms, source)
        begin = time.perf_counter()
        try:
            with stages.stage("pause"):
                await rooms.driver.pause(directory)
            open_ports = rooms.ports(source.id).sessions_open()
            with stages.stage("devices"):
                await rooms.driver.save_devices(directory)
            with stages.stage("disk"):
                await in_thread(_clone_disk, directory, target)
            with stages.stage("memory"):
                dirty = 0
                if private is not None:
                    dirty = await in_thread(private.collect, vmm.pid)
                else:
                    source = await in_thread(_make_safe, rooms, source, directory, target)
        finally:
            with stages.stage("resume"):
                await complete(rooms.driver.resume(directory))
        pause_ms = (time.perf_counter() - begin) * 1000
        with stages.stage("thaw"):  # its disk is cloned: what it writes need not wait until its memory is on ours
            await capture.thaw_disk(rooms, source)
        with stages.stage("finish"):
            mem_file, written = await in_thread(_finish, directory, target, source, private)
        ready = msgspec.structs.replace(
            stem,
            state=State.STANDBY,
            mem_file=mem_file,
            captured_at=time.time(),
            open_ports=open_ports,
            frozen=source.frozen,
            disk_stamp=directories.disk_stamp(target),
        )
        await in_thread(rooms.store.save, msgspec.structs.replace(source, frozen=False), done=True)
    except BaseException:
        await complete(capture.undo(rooms, source, private))
        raise
    return ready, CaptureReport(
        pause_ms=pause_ms, total_ms=stages.total_ms, ram_bytes_written=written, dirty_bytes=dirty, stages=stages.ms
    )


def _clone_disk(directory: Path, target: Path) -> None:
    clone_file(directory / files.OVERLAY_DISK, target / files.OVERLAY_DISK, sync=False)


def _make_safe(rooms: Rooms, source: Instance, directory: Path, target: Path) -> Instance:
    """Keep the memory of a paused first boot as it is now: in place, or where the VMM's mapping cannot be changed, by a copy."""
    if source.vmm is None:
        raise AssertionError("a running instance has a VMM")
    live = directory / files.LIVE_MEMORY
    try:
        make_private(source.vmm.pid, identify(live))
    except HostCannot as error:
        _log.warning("%s: the memory is copied while it is paused: %s", source.name, error)
        clone_file(live, target / files.MEMORY, mode=0o444, sync=False)
        return source
    changed = msgspec.structs.replace(source, mem_file=capture.adopt(directory))
    rooms.store.save(changed)
    return changed


def _finish(directory: Path, target: Path, source: Instance, private: PrivateCapture | None) -> tuple[MemFile, int]:
    """Everything that does not need the pause: the mem-file, the vmstate, the root and the volumes of the stem."""
    if private is not None:
        mem_file, stats = private.finish()
        written = stats.written_bytes
    elif source.mem_file is None:  # it was copied
        mem_file = memfile.freeze(target / files.MEMORY, target / files.MEMORY)
        written = (target / files.MEMORY).stat().st_blocks * 512
    else:
        mem_file, written = memfile.link(directory / files.MEMORY, target / files.MEMORY, source.mem_file)
    vmstate = directory / files.VMSTATE_NEW
    vmstate.chmod(0o444)
    vmstate.rename(target / files.VMSTATE)
    directories.place_root(target, directory / files.ROOT_DISK)
    directories.link_volumes(directory, target, source.machine)
    return mem_file, written


async def remove_stem(rooms: Rooms, stem: Instance) -> None:
    """The forks have their own links: the stem goes."""
    await complete(destroy.destroy(rooms, stem))
