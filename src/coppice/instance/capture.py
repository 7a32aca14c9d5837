"""Capture to standby: pause, save the devices, have RAM in a new file, end the VMM.

The outcome is decided by one commit to the journal. Before it, everything can be undone by resuming the guest; after it, everything that is left
(ending the VMM, renaming the new files into place) is idempotent and is finished, by this process or by the next.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import CoppiceError
from coppice.instance import directory as directories
from coppice.instance.rooms import Rooms
from coppice.memory import memfile
from coppice.memory.capture import PrivateCapture
from coppice.model import CaptureReport, Instance, MemFile, Sharing, State
from coppice.timing import Stages
from coppice.vmm import driver as files

NEW_MEMORY = "memory.new"
OPERATION = "standby"  # journal: until the commit, the guest is to run on
COMMITTED = "standby-commit"  # journal: the capture is whole, and is only to be put into place


async def standby(rooms: Rooms, instance: Instance) -> tuple[Instance, CaptureReport]:
    """Capture a Running or Paused instance and end its VMM. The caller holds the lock.

    If it fails, the guest runs again.

    :raises VmmError: the VMM refused
    :raises NoSpace: the disk is full
    """
    directory = rooms.directory(instance.id)
    if instance.vmm is None:
        raise AssertionError("a running instance has a VMM")
    stages = Stages()
    capture = None
    if instance.mem_file is not None:  # it runs on a private mapping of that file
        capture = PrivateCapture(directory / files.MEMORY, instance.mem_file, directory / NEW_MEMORY)
    written = dirty = 0
    try:
        await in_thread(rooms.store.begin, instance, OPERATION)
        if capture is not None:
            with stages.stage("prepare"):
                await in_thread(capture.prepare)
        with stages.stage("pause"):
            await rooms.driver.pause(directory)
        open_ports = rooms.ports(instance.id).sessions_open()
        with stages.stage("devices"):
            await rooms.driver.save_devices(directory)
        if capture is not None:
            with stages.stage("collect"):
                await in_thread(capture.collect, instance.vmm.pid)
            with stages.stage("finish"):
                _, stats = await in_thread(capture.finish)
            written, dirty = stats.written_bytes, stats.dirty_bytes
        with stages.stage("commit"):
            instance = msgspec.structs.replace(instance, open_ports=open_ports)
            await in_thread(rooms.store.begin, instance, COMMITTED)
    except BaseException:
        await complete(undo(rooms, instance, capture))
        raise
    captured = await complete(finish(rooms, instance, stages))
    report = CaptureReport(
        pause_ms=sum(stages.ms.get(name, 0.0) for name in ("pause", "devices", "collect")),
        total_ms=stages.total_ms,
        ram_bytes_written=written,
        dirty_bytes=dirty,
        stages=stages.ms,
    )
    return captured, report


async def undo(rooms: Rooms, instance: Instance, capture: PrivateCapture | None = None) -> None:
    """Let the guest run on as if nothing had been asked. Idempotent."""
    directory = rooms.directory(instance.id)
    if capture is not None:
        await in_thread(capture.abort)
    # A VMM that is gone has nothing to resume; its end is seen when it is looked at.
    with contextlib.suppress(CoppiceError):
        await rooms.driver.resume(directory)
    for name in (files.VMSTATE_NEW, NEW_MEMORY):
        (directory / name).unlink(missing_ok=True)
    await in_thread(directories.clear_temporaries, directory)
    await in_thread(rooms.store.save, msgspec.structs.replace(instance, state=State.RUNNING), done=True)


async def finish(rooms: Rooms, instance: Instance, stages: Stages) -> Instance:
    """Put a whole capture into place and record Standby. Idempotent: recovery calls it again after a crash at any point of it."""
    directory = rooms.directory(instance.id)
    if instance.vmm is not None:
        with stages.stage("end"):
            await rooms.driver.quit(directory, instance.vmm)
    with stages.stage("freeze"):
        mem_file = await in_thread(_into_place, directory)
        await in_thread(directories.clear_runtime, directory)
    captured = msgspec.structs.replace(
        instance,
        state=State.STANDBY,
        vmm=None,
        mem_file=mem_file,
        captured_at=time.time(),
        disk_stamp=directories.disk_stamp(directory),
    )
    with stages.stage("record"):
        await in_thread(rooms.store.save, captured, done=True)
        await in_thread(rooms.store.sync)
    return captured


def _into_place(directory: Path) -> MemFile:
    """Give the new files their final names; each step may have been done before."""
    vmstate_new, vmstate = directory / files.VMSTATE_NEW, directory / files.VMSTATE
    if vmstate_new.exists():
        vmstate_new.chmod(0o444)
        with vmstate_new.open("rb") as stream:
            os.fsync(stream.fileno())
        vmstate_new.rename(vmstate)
    for name in (NEW_MEMORY, files.LIVE_MEMORY):
        if (directory / name).exists():
            return memfile.freeze(directory / name, directory / files.MEMORY)
    status = (directory / files.MEMORY).stat()
    return MemFile(inode=status.st_ino, device=status.st_dev, size_bytes=status.st_size, sharing=Sharing.OWN)
