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
from coppice.errors import Busy, CoppiceError, GuestError, GuestTimeout, IntegrityError, VmmDied
from coppice.instance import directory as directories
from coppice.instance.activate import require_loadable
from coppice.instance.rooms import Rooms
from coppice.memory import memfile
from coppice.memory.capture import PrivateCapture
from coppice.memory.maps import identify, read_maps
from coppice.model import CaptureReport, Instance, MemFile, Sharing, State
from coppice.timing import Stages
from coppice.vmm import driver as files

NEW_MEMORY = "memory.new"
FREEZE_S = 30.0  # the guest thaws by itself after so long
_FREEZE_DEADLINE_S = 5.0
_SYNC_DEADLINE_S = 30.0
OPERATION = "standby"  # journal: until the commit, the guest is to run on
COMMITTED = "standby-commit"  # journal: the capture is whole, and is only to be put into place


async def standby(rooms: Rooms, instance: Instance) -> tuple[Instance, CaptureReport]:
    """Capture a Running or Paused instance and end its VMM. The caller holds the lock.

    If it fails, the guest runs again.

    :raises Refused: it could not be loaded here
    :raises VmmError: the VMM refused
    :raises NoSpace: the disk is full
    """
    directory = rooms.directory(instance.id)
    vmm = instance.vmm
    if vmm is None:
        raise AssertionError("a running instance has a VMM")
    await require_loadable(rooms, instance)
    stages = Stages()
    capture = None
    instance = await with_true_base(rooms, instance)
    if instance.mem_file is not None:  # it runs on a private mapping of that file
        capture = PrivateCapture(directory / files.MEMORY, instance.mem_file, directory / NEW_MEMORY)
    written = dirty = 0
    try:
        await in_thread(rooms.store.begin, instance, OPERATION)
        if capture is not None:
            with stages.stage("prepare"):  # before the sync: a clone may take long, and the guest writes on
                await in_thread(capture.prepare)
        with stages.stage("sync"):
            await sync_disk(rooms, instance)
        with stages.stage("pause"):
            await rooms.driver.pause(directory)
        open_ports = rooms.ports(instance.id).sessions_open()
        with stages.stage("devices"):
            await rooms.driver.save_devices(directory)
        if capture is not None:
            with stages.stage("collect"):
                await in_thread(capture.collect, vmm.pid)
            with stages.stage("finish"):
                _, stats = await in_thread(capture.finish)
            written, dirty = stats.written_bytes, stats.dirty_bytes
        with stages.stage("commit"):
            instance = msgspec.structs.replace(instance, open_ports=open_ports)
            await in_thread(rooms.store.begin, instance, COMMITTED)
    except BaseException:
        if await in_thread(
            rooms.store.is_at, instance.id, COMMITTED
        ):  # it was cancelled too late: if the guest ran on, it would change the disk
            await complete(finish(rooms, instance, stages))
        else:
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


async def sync_disk(rooms: Rooms, instance: Instance) -> None:
    """Have the guest write out what it holds back: a fork to Stopped takes the disk alone.

    Not frozen, as for a capture of a running source: each fork would begin with the thaw, its first write to the disk, which doubles what an
    emulated guest has to do before it is itself. The journal is replayed where the disk is booted. A guest that does not answer is captured without.
    """
    if instance.state is State.RUNNING:
        with contextlib.suppress(GuestError, VmmDied, Busy):
            async with rooms.ports(instance.id).control(_SYNC_DEADLINE_S) as control:
                await control.sync()


async def freeze_disk(rooms: Rooms, instance: Instance) -> Instance:
    """Freeze the guest's file system, so that its disk is clean at the capture; return the record that says so.

    A guest that does not answer is captured without: its disk then needs its journal replayed, as after a power cut. It is called frozen all the same:
    one with much to write first may come to be, here and in each fork, and would then write nothing until it thaws by itself. To thaw what is not
    frozen does no harm.
    """
    frozen = False
    if instance.state is State.RUNNING:
        with contextlib.suppress(GuestError, VmmDied, Busy):
            async with rooms.ports(instance.id).control(_FREEZE_DEADLINE_S) as control:
                with contextlib.suppress(GuestTimeout):
                    await control.freeze(FREEZE_S)
                frozen = True
    return msgspec.structs.replace(instance, frozen=frozen)


async def thaw_disk(rooms: Rooms, instance: Instance) -> None:
    """Let the guest write again. It does so by itself after `FREEZE_S`, should this not reach it."""
    if instance.frozen:
        with contextlib.suppress(GuestError, VmmDied, Busy):
            async with rooms.ports(instance.id).control(_FREEZE_DEADLINE_S) as control:
                await control.thaw()


async def with_true_base(rooms: Rooms, instance: Instance) -> Instance:
    """The record as the VMM's mappings have it: RAM is taken to be in a file only where the kernel says that it is written there.

    A host that was killed while it made a mapping private leaves a record that says otherwise; to freeze that file would lose every page
    that the guest has written since.
    """
    directory = rooms.directory(instance.id)
    if (
        instance.mem_file is None
        and instance.vmm is not None
        and await in_thread(_runs_privately, directory, instance.vmm.pid)
    ):
        instance = msgspec.structs.replace(instance, mem_file=await in_thread(adopt, directory))
        await in_thread(rooms.store.save, instance)
    return instance


def _runs_privately(directory: Path, pid: int) -> bool:
    found = [path for path in (directory / files.LIVE_MEMORY, directory / files.MEMORY) if path.exists()]
    return any(vma.file == identify(path) and vma.private for path in found for vma in read_maps(pid))


def adopt(directory: Path) -> MemFile:
    """Make the file that a first boot wrote into an immutable mem-file, now that nobody writes into it. Idempotent; not synced."""
    live, memory = directory / files.LIVE_MEMORY, directory / files.MEMORY
    if live.exists():
        live.chmod(0o444)
        live.rename(memory)
    status = memory.stat()
    return MemFile(inode=status.st_ino, device=status.st_dev, size_bytes=status.st_size, sharing=Sharing.OWN)


async def undo(rooms: Rooms, instance: Instance, capture: PrivateCapture | None = None) -> None:
    """Let the guest run on as if nothing had been asked; one that cannot be resumed is recorded as Paused. Idempotent."""
    directory = rooms.directory(instance.id)
    if capture is not None:
        await in_thread(capture.abort)
    state = State.PAUSED
    # A VMM that is gone has nothing to resume; its end is seen when it is looked at.
    with contextlib.suppress(CoppiceError):
        await rooms.driver.resume(directory)
        state = State.RUNNING
        instance = await with_true_base(rooms, instance)
        await thaw_disk(rooms, instance)
    for name in (files.VMSTATE_NEW, NEW_MEMORY):
        (directory / name).unlink(missing_ok=True)
    await in_thread(directories.clear_temporaries, directory)
    await in_thread(rooms.store.save, msgspec.structs.replace(instance, state=state, frozen=False), done=True)


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
    """Give the new files their final names, and have the disks survive what they survive; each step may have been done before."""
    # Memory without the disks of the same instant is of no use after a power cut.
    for path in (directory / name for name in (files.OVERLAY_DISK, *directories.VOLUME_DISKS)):
        if path.exists():
            with path.open("rb") as disk:
                os.fsync(disk.fileno())
    vmstate_new, vmstate = directory / files.VMSTATE_NEW, directory / files.VMSTATE
    if vmstate_new.exists():
        vmstate_new.chmod(0o444)
        with vmstate_new.open("rb") as stream:
            os.fsync(stream.fileno())
        vmstate_new.rename(vmstate)
    elif not vmstate.exists():
        raise IntegrityError(f"the device state {vmstate} is gone", hint="start the machine anew from its disk")
    for name in (NEW_MEMORY, files.LIVE_MEMORY):
        if (directory / name).exists():
            return memfile.freeze(directory / name, directory / files.MEMORY)
    return adopt(directory)
