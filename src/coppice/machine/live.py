"""Capture a machine that keeps running, for `fork --from-running` and for snapshots.

The source is paused while its devices are saved, its disks are frozen or copied (see `live_disk`),
and its memory is secured.
Every path resumes it. The capture goes into the directory of a *stem*: a Standby instance that
exists only while the forks take their links from it.

The driver returns where the memory is (see `Saved`):

* IN_PROCESS: the source runs on a private mapping, as a fork or after a restore. Its private pages
  are collected, in time proportional to their number.
* IN_FILE: the source writes into its file since its first boot. Its mapping is made private in
  place, without a copy. The file becomes the base, the stem gets a link to it, and the source
  continues on a private mapping as a fork does.
* WRITTEN: the VMM has written all memory to a new file, which becomes the stem's.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from coppice.completion import complete, in_thread
from coppice.errors import HostCannot
from coppice.linux.clone import clone_file
from coppice.linux.files import os_errors
from coppice.linux.remap import make_private
from coppice.machine import capture, console, destroy, disks, live_disk, volumes
from coppice.machine import directory as directories
from coppice.machine.activate import require_loadable
from coppice.machine.disk import Layers
from coppice.machine.rooms import Rooms
from coppice.memory import memfile
from coppice.memory.capture import PrivateCapture
from coppice.model import Capture, CaptureReport, Instance, MemLayer, State
from coppice.names import new_id
from coppice.state import locks
from coppice.state.journal import JournalOperation
from coppice.timing import Stages
from coppice.vmm import driver as files
from coppice.vmm.driver import Saved

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def stem(rooms: Rooms, source: Instance, check: Callable[[], None] | None = None) -> AsyncIterator[Instance]:
    """Record a stem and hold its lock during the block; then remove it. No user can see or name it.

    :param check: called in the transaction that records the stem
    """
    made = new_stem(source)
    async with contextlib.AsyncExitStack() as held:
        try:
            # The record comes first: a sweep removes a lock file without one.
            (made,) = await in_thread(rooms.store.create, [made], JournalOperation.FORK, check)
            await held.enter_async_context(locks.hold(rooms.layout.lock(made.id), what=f"the capture of {source.name}"))
            yield made
        finally:
            await complete(destroy.destroy(rooms, made))


def new_stem(source: Instance) -> Instance:
    """Return the record of a stem."""
    own_id = new_id()
    return msgspec.structs.replace(
        source,
        id=own_id,
        name=f".{own_id}",  # not a valid name, so it conflicts with no other
        stem_of=source.name,
        state=State.CREATED,
        created_at=time.time(),
        machine=volumes.with_clones(source.machine),
        publish=(),
        vmm=None,
        capture=None,
        parent=None,
        parent_name=None,
    )


async def take_disk(rooms: Rooms, source: Instance, target: Path) -> tuple[dict[str, Layers], float]:
    """Give the directory `target` the disks of a Running source, with the overlay's file system frozen.

    :return: the layers of the disks in `target`, and how long the source was paused, in ms
    :raises VmmError: the VMM refused; the source continues
    :raises NoSpace: the disk is full; the source continues
    """
    directory, driver = rooms.directory(source.id), rooms.driver(source)
    frozen = False
    try:
        await in_thread(rooms.store.begin, source, JournalOperation.FORK_RUNNING)
        source = await live_disk.prepare(rooms, source)
        frozen = True  # possibly, even if the next call is cancelled
        frozen = await _quiet_disks(rooms, source)
        begin = time.perf_counter()
        try:
            await driver.pause(directory)
            layers = await live_disk.take(rooms, source, target)
        finally:
            await complete(driver.resume(directory))
        pause_ms = (time.perf_counter() - begin) * 1000
        if frozen:
            await capture.thaw_disk(rooms, source)
        await live_disk.share(rooms, source, target)
        await in_thread(rooms.store.save, source, done=True)
    except BaseException:
        await complete(capture.undo(rooms, source, frozen=frozen))
        raise
    return layers, pause_ms


async def capture_running(rooms: Rooms, source: Instance, stem: Instance) -> tuple[Instance, CaptureReport]:
    """Capture a Running source into the stem's directory; return the stem as Standby.

    The caller holds the source's lock and has recorded the stem.

    :raises Refused: the capture could not be loaded on this host
    :raises VmmError: the VMM refused; the source continues
    :raises NoSpace: the disk is full; the source continues
    """
    vmm = source.vmm
    if vmm is None:
        raise AssertionError("a running instance has a VMM")
    await require_loadable(rooms, source)
    directory, target, driver = rooms.directory(source.id), rooms.directory(stem.id), rooms.driver(source)
    stages = Stages()
    private = None
    frozen = False
    try:
        await in_thread(rooms.store.begin, source, JournalOperation.FORK_RUNNING)
        await in_thread(capture.clear_new, directory)
        await in_thread(directories.create, target)
        source = await capture.with_true_base(rooms, source)
        with stages.stage("layer"):
            source = await live_disk.prepare(rooms, source)
        if source.capture is not None:
            private = capture.private_capture(source, driver.capabilities, directory, target / files.MEMORY_NEW)
            with stages.stage("prepare"):
                await in_thread(private.prepare)
                if not await in_thread(private.copy_ahead, vmm.pid):
                    await in_thread(private.collect, vmm.pid)  # warms buffers and tables for the pause
        with stages.stage("freeze"):
            shared = await capture.shared_random(rooms, source)
            frozen = True  # possibly, even if the next call is cancelled
            frozen = await _quiet_disks(rooms, source)
        await rooms.ports(source).close_idle()  # each open port costs the restored machine time
        if private is not None:
            with stages.stage("ahead"):
                await in_thread(private.copy_ahead, vmm.pid)
        begin = time.perf_counter()
        try:
            with stages.stage("pause"):
                await driver.pause(directory)
            open_ports, console_end = rooms.ports(source).sessions_open(), console.size(directory)
            with stages.stage("devices"):
                saved = await driver.save(directory)
            with stages.stage("disk"):
                layers = await live_disk.take(rooms, source, target)
            with stages.stage("memory"):
                dirty = 0
                if saved is Saved.IN_FILE:
                    source = await in_thread(_make_safe, rooms, source, directory, target)
                elif saved is Saved.IN_PROCESS:
                    if private is None:
                        raise capture.no_base(source)
                    dirty = await in_thread(private.collect, vmm.pid)
        finally:
            with stages.stage("resume"):
                await complete(driver.resume(directory))
        pause_ms = (time.perf_counter() - begin) * 1000
        with stages.stage("thaw"):  # the disk is taken, so the guest may write before its memory is stored
            if frozen:
                await capture.thaw_disk(rooms, source)
        with stages.stage("share"):
            await live_disk.share(rooms, source, target)
        with stages.stage("finish"):
            taken, written = await in_thread(_finish, directory, target, source, private, saved)
            taken = msgspec.structs.replace(
                taken,
                open_ports=open_ports,
                frozen=frozen,
                shared_random=shared,
                printed=await console.printed(directory, source, console_end),
            )
        captured = directories.captured_here(taken, target, layers)
        ready = msgspec.structs.replace(stem, state=State.STANDBY, capture=captured, disk_layers=layers)
        await in_thread(rooms.store.save, source, done=True)
    except BaseException:
        await complete(capture.undo(rooms, source, private, frozen=frozen))
        raise
    return ready, CaptureReport(
        pause_ms=pause_ms, total_ms=stages.total_ms, ram_bytes_written=written, dirty_bytes=dirty, stages=stages.ms
    )


async def _quiet_disks(rooms: Rooms, source: Instance) -> bool:
    """Let the guest write its dirty data to its disks, and freeze the file system of its overlay.

    Return whether the guest must be thawed.
    """
    if len(disks.of(source)) > 1:  # the freeze is of the overlay alone
        await capture.sync_disk(rooms, source)
    return await capture.freeze_disk(rooms, source)


def _make_safe(rooms: Rooms, source: Instance, directory: Path, target: Path) -> Instance:
    """Keep the current memory of a paused first boot: in place, or by a copy if that fails."""
    if source.vmm is None:
        raise AssertionError("a running instance has a VMM")
    live = directory / files.LIVE_MEMORY
    try:
        make_private(source.vmm.pid, live)
    except HostCannot as error:
        _log.warning("%s: the memory is copied while it is paused: %s", source.name, error)
        clone_file(live, target / files.MEMORY, mode=0o444, sync=False)
        return source
    changed = msgspec.structs.replace(source, capture=capture.new_capture(source, capture.adopt(directory)))
    rooms.store.save(changed)
    return changed


def _finish(
    directory: Path, target: Path, source: Instance, private: PrivateCapture | None, saved: Saved
) -> tuple[Capture, int]:
    """Do the steps that need no pause: place the stem's memory, vmstate and root."""
    layers: tuple[MemLayer, ...] = ()
    if saved is Saved.IN_PROCESS and private is not None:
        mem_file, layers, stats = private.finish()
        written = stats.written_bytes
    elif saved is Saved.IN_FILE and source.mem_file is not None:  # the mapping was made private
        mem_file, written = memfile.link(directory / files.MEMORY, target / files.MEMORY, source.mem_file)
    else:  # the VMM wrote the memory, or it was copied
        whole = directory / files.MEMORY_NEW if saved is Saved.WRITTEN else target / files.MEMORY
        mem_file = memfile.freeze(whole, target / files.MEMORY)
        written = memfile.allocated(target / files.MEMORY)
    if private is not None:
        private.abort()  # removes its file if it was not needed
    directories.require_saved(directory, source.machine, mem_file)
    taken = capture.new_capture(source, mem_file, layers)
    if layers:  # all but the topmost are the source's
        older, more = directories.link_memory(directory, target, msgspec.structs.replace(taken, layers=layers[:-1]))
        taken = msgspec.structs.replace(older, layers=(*older.layers, layers[-1]))
        written += more
    directories.place_memory(target, taken)
    with os_errors(f"place the device state of {source.name}"):
        vmstate = directory / files.VMSTATE_NEW
        vmstate.chmod(0o444)
        vmstate.rename(target / files.VMSTATE)
    directories.place_root(target, directory / files.ROOT_DISK)
    return taken, written
