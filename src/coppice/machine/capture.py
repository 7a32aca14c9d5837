"""Capture to standby: pause, save, make RAM, device state and disks durable, end the VMM.

One commit to the journal decides the outcome. Before the commit, resuming the guest undoes
everything. So each step that can fail for lack of space or a disk error comes before the commit: a
failed capture never costs the guest. After the commit only ending the VMM and renaming files
remain. Both are idempotent, and this process or the next one finishes them.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import Busy, CoppiceError, GuestError, GuestTimeout, IntegrityError, VmmDied
from coppice.linux.files import os_errors, sync
from coppice.linux.maps import identify, read_maps
from coppice.machine import console, limits, live_disk
from coppice.machine import directory as directories
from coppice.machine.activate import require_loadable
from coppice.machine.rooms import Rooms
from coppice.memory import memfile
from coppice.memory.capture import PrivateCapture
from coppice.model import Capture, CaptureReport, Instance, MemFile, MemLayer, State
from coppice.state.journal import JournalOperation
from coppice.timing import Stages
from coppice.vmm import driver as files
from coppice.vmm.driver import Capabilities, Saved

FREEZE_S = 30.0  # after this time the guest thaws by itself
_FREEZE_DEADLINE_S = 5.0
_SYNC_DEADLINE_S = 30.0


async def standby(rooms: Rooms, instance: Instance) -> tuple[Instance, CaptureReport]:
    """Capture a Running or Paused instance and end its VMM. The caller holds the lock.

    On failure the guest runs again.

    :raises Refused: the capture could not be loaded on this host
    :raises VmmError: the VMM refused
    :raises NoSpace: the disk is full
    """
    directory, driver = rooms.directory(instance.id), rooms.driver(instance)
    vmm = instance.vmm
    if vmm is None:
        raise AssertionError("a running instance has a VMM")
    await require_loadable(rooms, instance)
    stages = Stages()
    private = None
    instance = await with_true_base(rooms, instance)
    if instance.capture is not None:  # the VMM runs on a private mapping of that file
        private = private_capture(instance, driver.capabilities, directory, directory / files.MEMORY_NEW)
    written = dirty = 0
    try:
        await in_thread(rooms.store.begin, instance, JournalOperation.STANDBY)
        await in_thread(clear_new, directory)
        if private is not None:
            with stages.stage("prepare"):  # before the sync: a clone may take long, and the guest still writes
                await in_thread(private.prepare)
        with stages.stage("sync"):
            shared = await shared_random(rooms, instance)
            await sync_disk(rooms, instance)
        await rooms.ports(instance).close_idle()  # each open port costs the restored machine time
        with stages.stage("pause"):
            await driver.pause(directory)
        open_ports = rooms.ports(instance).sessions_open()
        with stages.stage("devices"):
            saved = await driver.save(directory)
        memory = directory / (files.LIVE_MEMORY if saved is Saved.IN_FILE else files.MEMORY_NEW)
        if saved is Saved.IN_PROCESS:
            if private is None:
                raise no_base(instance)
            with stages.stage("collect"):
                await in_thread(private.collect, vmm.pid)
            with stages.stage("finish"):
                mem_file, layers, stats = await in_thread(private.finish)
            written, dirty = stats.written_bytes, stats.dirty_bytes
        else:
            mem_file, layers = await in_thread(memfile.describe, memory), ()
            written = await in_thread(memfile.allocated, memory) if saved is Saved.WRITTEN else 0
        with stages.stage("secure"):  # before the commit: a later failure would cost the guest
            await in_thread(directories.sync_capture, directory, instance, mem_file, memory)
        with stages.stage("commit"):
            printed = await console.printed(directory, instance, console.size(directory))
            capture = new_capture(instance, mem_file, layers, open_ports, shared, printed)
            committed = msgspec.structs.replace(instance, capture=capture)
            await in_thread(rooms.store.begin, committed, JournalOperation.STANDBY_COMMIT)
    except BaseException:
        # After the commit a cancellation comes too late: a resumed guest would change the captured
        # disk.
        if await in_thread(rooms.store.is_at, instance.id, JournalOperation.STANDBY_COMMIT):
            await complete(finish(rooms, committed, stages))
        else:
            await complete(undo(rooms, instance, private))
        raise
    captured = await complete(finish(rooms, committed, stages))
    report = CaptureReport(
        pause_ms=sum(stages.ms.get(name, 0.0) for name in ("pause", "devices", "collect")),
        total_ms=stages.total_ms,
        ram_bytes_written=written,
        dirty_bytes=dirty,
        stages=stages.ms,
    )
    return captured, report


def private_capture(instance: Instance, able: Capabilities, directory: Path, out: Path) -> PrivateCapture:
    """Return the capture of a machine that runs on a private mapping of its captured memory in `directory`."""
    capture = instance.capture
    if capture is None:
        raise AssertionError("a private mapping is of a captured memory")
    return PrivateCapture(
        directory / files.MEMORY,
        capture.mem_file,
        out,
        capture.layers,
        layered=able.maps_layers,
        observable=able.observable,
    )


def no_base(instance: Instance) -> IntegrityError:
    """Return the error for a VMM with private pages over a mem-file that no record names."""
    return IntegrityError(
        f"the memory of {instance.name} is private pages over a file that is not recorded",
        hint="keep its disk with `coppice snapshot create NAME --kind stopped`, or run `coppice stop NAME`",
    )


def new_capture(
    instance: Instance,
    mem_file: MemFile,
    layers: tuple[MemLayer, ...] = (),
    open_ports: tuple[int, ...] = (),
    shared: tuple[str, ...] = (),
    printed: str = "",
) -> Capture:
    """Return the record of a running instance's new capture, without its disk stamp."""
    if instance.manifest is None:
        raise AssertionError("a machine is started with its manifest")
    return Capture(
        mem_file=mem_file,
        layers=layers,
        manifest=instance.manifest,
        captured_at=time.time(),
        open_ports=open_ports,
        identity_serial=instance.identity_serial,
        shared_random=shared,
        printed=printed,
    )


async def shared_random(rooms: Rooms, instance: Instance) -> tuple[str, ...]:
    """Return the guest's processes whose random generators its forks would share.

    The report must not prevent a capture, so a guest that does not answer reports none, as one with
    an older agent does.
    """
    if instance.state is State.RUNNING:
        with contextlib.suppress(GuestError, VmmDied, Busy):
            async with rooms.ports(instance).control(_FREEZE_DEADLINE_S) as control:
                return await control.shared_random()
    return ()


async def sync_disk(rooms: Rooms, instance: Instance) -> None:
    """Let the guest write its dirty data to the disk, since a fork to Stopped takes the disk alone.

    The file system is not frozen, unlike in a capture of a running source. Each fork would have to
    thaw it first, which doubles an emulated guest's work before it is ready. If the disk is booted,
    its journal is replayed. A guest that does not answer is captured without the sync.
    """
    if instance.state is State.RUNNING:
        with contextlib.suppress(GuestError, VmmDied, Busy):
            async with rooms.ports(instance).control(_SYNC_DEADLINE_S) as control:
                await control.sync()


async def freeze_disk(rooms: Rooms, instance: Instance) -> bool:
    """Freeze the guest's file system for a clean disk; return whether the guest must be thawed.

    A guest that does not answer in time is captured anyway: its disk then needs a journal replay,
    as after a power cut. It must be thawed all the same. If it has much to write, it may freeze
    later, here and in each fork, and block all writes until it thaws by itself. A needless thaw
    does no harm.
    """
    frozen = False
    if instance.state is State.RUNNING:
        with contextlib.suppress(GuestError, VmmDied, Busy):
            async with rooms.ports(instance).control(_FREEZE_DEADLINE_S) as control:
                with contextlib.suppress(GuestTimeout):
                    await control.freeze(FREEZE_S)
                frozen = True
    return frozen


async def thaw_disk(rooms: Rooms, instance: Instance) -> None:
    """Thaw the guest's file system. A guest that does not answer thaws after `FREEZE_S`."""
    with contextlib.suppress(GuestError, VmmDied, Busy):
        async with rooms.ports(instance).control(_FREEZE_DEADLINE_S) as control:
            await control.thaw()


async def with_true_base(rooms: Rooms, instance: Instance) -> Instance:
    """Return the record, corrected if the VMM maps a first boot's RAM privately.

    A host process that was killed while it made the mapping private leaves a record that says that
    the RAM is in the file. Freezing that file would lose every page that the guest has written
    since.
    """
    directory = rooms.directory(instance.id)
    if (
        instance.capture is None
        and instance.vmm is not None
        and await in_thread(_runs_privately, directory, instance.vmm.pid)
    ):
        instance = msgspec.structs.replace(instance, capture=new_capture(instance, await in_thread(adopt, directory)))
        await in_thread(rooms.store.save, instance)
    return instance


def _runs_privately(directory: Path, pid: int) -> bool:
    found = [path for path in (directory / files.LIVE_MEMORY, directory / files.MEMORY) if path.exists()]
    return any(vma.file == identify(path) and vma.private for path in found for vma in read_maps(pid))


def adopt(directory: Path) -> MemFile:
    """Make a first boot's RAM file an immutable mem-file. No VMM writes to it any longer.

    Idempotent; not synced.
    """
    live, memory = directory / files.LIVE_MEMORY, directory / files.MEMORY
    with os_errors(f"freeze {live}"):
        if live.exists():
            live.chmod(0o444)
            live.rename(memory)
    return memfile.describe(memory)


async def undo(
    rooms: Rooms, instance: Instance, private: PrivateCapture | None = None, *, frozen: bool = False
) -> None:
    """Resume the guest after a failed capture; if it cannot be resumed, record it as Paused.
    Idempotent.

    :param frozen: the guest's file system may be frozen: thaw it
    """
    directory = rooms.directory(instance.id)
    if private is not None:
        await in_thread(private.abort)
    # The record may be ahead of the caller: a cancelled call does not return what it has saved.
    recorded, _ = await rooms.store.look_up(instance.id)
    instance = msgspec.structs.replace(instance, disk_layers=recorded.disk_layers)
    state = State.PAUSED
    # A VMM that has ended cannot be resumed; `recovery.look` records its end later.
    with contextlib.suppress(CoppiceError):
        await rooms.driver(instance).resume(directory)
        state = State.RUNNING
        instance = await with_true_base(rooms, instance)
        if frozen:
            await thaw_disk(rooms, instance)
        instance = await live_disk.with_true_layers(rooms, instance)
    await in_thread(clear_new, directory)
    await in_thread(rooms.store.save, msgspec.structs.replace(instance, state=state), done=True)


def clear_new(directory: Path) -> None:
    """Remove the files of a capture that was not committed. Idempotent."""
    with os_errors("remove an unfinished capture"):
        for name in (files.VMSTATE_NEW, files.MEMORY_NEW):
            (directory / name).unlink(missing_ok=True)
    directories.clear_temporaries(directory)


async def finish(rooms: Rooms, instance: Instance, stages: Stages) -> Instance:
    """Move a committed capture into place and record Standby.

    Idempotent: recovery calls it again after a crash at any point.
    """
    directory = rooms.directory(instance.id)
    if instance.capture is None:
        raise AssertionError("a capture is committed with its record")
    if instance.vmm is not None:
        with stages.stage("end"):
            await rooms.driver(instance).quit(directory, instance.vmm)
            await in_thread(limits.release, directory)
            await rooms.networks.detach(instance.id)
    with stages.stage("freeze"):
        placed = await in_thread(_into_place, directory, instance.capture)
        await in_thread(directories.clear_runtime, directory)
    captured = msgspec.structs.replace(
        instance,
        state=State.STANDBY,
        vmm=None,
        capture=directories.captured_here(placed, directory, instance.disk_layers),
    )
    with stages.stage("record"):
        await in_thread(rooms.store.save, captured, done=True, durable=True)
    return captured


def _into_place(directory: Path, capture: Capture) -> Capture:
    """Give the new files, which are already synced, their final names, durably; return the capture there. Idempotent.

    :raises IntegrityError: a file is missing
    """
    vmstate_new, vmstate = directory / files.VMSTATE_NEW, directory / files.VMSTATE
    if vmstate_new.exists():
        with os_errors(f"put {vmstate} into place"):
            vmstate_new.chmod(0o444)
            vmstate_new.rename(vmstate)
    elif not vmstate.exists():
        raise IntegrityError(
            f"the device state {vmstate} is missing", hint="boot the machine from its disk: `coppice start NAME`"
        )
    directories.place_memory(directory, capture)
    if capture.layers:
        directories.check_memory(directory, capture)
    else:
        capture = msgspec.structs.replace(capture, mem_file=adopt(directory))
    sync(directory)
    sync(directory.parent)
    return capture
