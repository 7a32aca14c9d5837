"""An instance's directory: placing files in it, syncing them, removing it. All functions block.

Each file that an instance maps or opens is a link or clone in its own directory: the mem-file, the
vmstate, the image's root, the kernel. It never opens a path in another directory. So no delete,
rename or new capture elsewhere affects it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from coppice.content.overlay import OverlayStore
from coppice.errors import IntegrityError
from coppice.linux.files import is_temporary, os_errors, sync, temporary_beside
from coppice.linux.link import IMMUTABLE, link_or_copy
from coppice.machine import console, disks, volumes
from coppice.machine.disks import LayersByName
from coppice.memory import layers, memfile
from coppice.model import Capture, Instance, MachineSpec, MemFile, Sharing
from coppice.vmm import driver as files
from coppice.vmm.driver import Capabilities, Disk, VmmDriver

LAYERS = tuple(layers.path_of(Path(files.MEMORY), number).name for number in range(1, layers.MOST + 1))
_MEMORY = (files.MEMORY, *LAYERS, files.VMSTATE)
CAPTURED = (*_MEMORY, files.OVERLAY_DISK)
_REMOVED = ".removed"
_SEE_LOG = "see its log with `coppice logs --vmm NAME`"
LOG_KEPT = 8 << 20  # bytes
_REMOVALS = 8  # attempts: a process with the directory open may still make a lock file for each port
_RUNTIME = (files.LIVE_MEMORY, files.VMSTATE_NEW, files.MEMORY_NEW, console.SEEN)
_SOCKET = ".sock"


class Placed(NamedTuple):
    """The result of placing files: the source's capture with this fork's own mem-file and disks."""

    capture: Capture | None
    bytes_written: int
    disk_layers: Mapping[str, tuple[int, ...]] = {}


def devices(machine: MachineSpec, layers: LayersByName = MappingProxyType({})) -> tuple[Disk, ...]:
    """Return a machine's disks in the order of their devices. The agent finds them by serial.

    :param layers: of its disks
    """
    overlay, *volumes_written = (
        Disk(path=top, serial=each.name, readonly=False, size_bytes=each.size_bytes, below=tuple(below))
        for each in disks.of_machine(machine, layers)
        for *below, top in (each.files,)
    )
    written = {each.serial: each for each in volumes_written}
    attached = (
        written.get(name) or Disk(path=name + files.RAW, serial=name, readonly=True, size_bytes=volume.size_bytes)
        for name, volume in zip(disks.VOLUMES, machine.volumes, strict=False)
    )
    return (overlay, Disk(path=files.ROOT_DISK, serial="root", readonly=True, size_bytes=0), *attached)


@os_errors("make a directory")
def create(directory: Path) -> None:
    """Make the directory, accessible to its owner only.

    :raises NoSpace: the file system is full
    :raises Refused: the directory exists
    """
    directory.mkdir(mode=0o700)


@os_errors("place the image")
def place_root(directory: Path, root: Path) -> None:
    """Link the image's root, since the image may be removed meanwhile. Idempotent."""
    _link(root, directory / files.ROOT_DISK)


def place_overlay(directory: Path, overlays: OverlayStore, size_bytes: int) -> None:
    """Make the instance's writable disk, empty."""
    overlays.create(size_bytes, directory / files.OVERLAY_DISK)


@os_errors("place the kernel")
def place_kernel(directory: Path, kernel: Path, initrd: Path) -> None:
    """Link a kernel and its initrd (or their stubs, for a restore), replacing existing ones."""
    for source, name in ((kernel, files.KERNEL), (initrd, files.INITRD)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")  # noqa: PTH108 - a fork does this many times
        link_or_copy(source, f"{directory}/{name}")


@os_errors("place the files of a fork")
def place_fork(
    source: Path,
    directory: Path,
    instance: Instance,
    *,
    with_memory: bool,
    starts: bool,
    drivers: tuple[VmmDriver, VmmDriver],
    overlays: OverlayStore,
) -> Placed:
    """Fill a fork's empty directory from its source's: link immutable files, put a layer over each disk or clone it.

    The other parameters and errors are those of `place_capture`.

    :param starts: whether the fork is started now
    :param drivers: the source's and the fork's
    """
    layers, written = disks.fork(source, directory, instance, drivers, overlays, starts=starts)
    own = msgspec.structs.replace(instance, disk_layers=layers)
    placed = place_capture(source, directory, own, with_memory=with_memory, able=drivers[0].capabilities)
    return Placed(placed.capture, written + placed.bytes_written, layers)


@os_errors("place captured files")
def place_capture(
    source: Path, directory: Path, instance: Instance, *, with_memory: bool, able: Capabilities
) -> Placed:
    """Link the immutable files of a source: the root, its read-only volumes, and its memory.

    :param instance: the source, with the layers of the disks that are in `directory`
    :param with_memory: also link the memory and vmstate
    :param able: of the driver: memory that it cannot map privately, or layers that it cannot map,
        are copied
    :raises IntegrityError: the source's memory has changed since the capture
    :raises NoSpace: the disk is full
    """
    _link(f"{source}/{files.ROOT_DISK}", f"{directory}/{files.ROOT_DISK}")
    volumes.link_readonly(source, directory, instance.machine)
    if not with_memory or instance.capture is None:
        return Placed(None, 0, instance.disk_layers)
    if instance.capture.layers and not (able.maps_layers and able.maps_mem_file_privately):
        capture, written = _flatten(source, directory, instance.capture)
    elif able.maps_mem_file_privately:
        capture, written = link_memory(source, directory, instance.capture)
    else:
        reason = "the driver does not map mem-files privately"
        mem_file, written = memfile.copy_private(source / files.MEMORY, directory / files.MEMORY, reason=reason)
        capture = msgspec.structs.replace(instance.capture, mem_file=mem_file)
    written += link_or_copy(f"{source}/{files.VMSTATE}", f"{directory}/{files.VMSTATE}").bytes_written
    return Placed(captured_here(capture, directory, instance.disk_layers), written, instance.disk_layers)


def memory_paths(directory: Path, capture: Capture) -> list[Path]:
    """Return the paths of a captured memory: the base, and its layers from the lowest on."""
    return [directory / name for name in _memory_names(capture)]


def _memory_names(capture: Capture) -> tuple[str, ...]:
    return (files.MEMORY, *LAYERS)[: 1 + len(capture.layers)]


def check_memory(directory: Path, capture: Capture) -> None:
    """Compare the files of a memory with what was recorded, except their contents.

    :raises IntegrityError: the message names the difference
    """
    for name, expected in zip(_memory_names(capture), capture.memory, strict=True):
        memfile.check(f"{directory}/{name}", expected)


def link_memory(source: Path, directory: Path, capture: Capture) -> tuple[Capture, int]:
    """Link a captured memory, or copy what cannot be linked; return its record there, and the bytes written.

    :raises IntegrityError: a file has changed since the capture
    :raises NoSpace: the disk is full
    """
    written = 0
    linked = []
    for name, expected in zip(_memory_names(capture), capture.memory, strict=True):
        file, more = memfile.link(f"{source}/{name}", f"{directory}/{name}", expected)
        linked.append(file)
        written += more
    above = tuple(
        msgspec.structs.replace(layer, **msgspec.structs.asdict(file))
        for layer, file in zip(capture.layers, linked[1:], strict=True)
    )
    return msgspec.structs.replace(capture, mem_file=linked[0], layers=above), written


def _flatten(source: Path, directory: Path, capture: Capture) -> tuple[Capture, int]:
    check_memory(source, capture)
    reason = "the driver does not map layers of memory"
    destination = directory / files.MEMORY
    mem_file, written = layers.flatten(source / files.MEMORY, capture.layers, destination, reason=reason)
    return msgspec.structs.replace(capture, mem_file=mem_file, layers=()), written


def place_memory(directory: Path, capture: Capture) -> None:
    """Give the new file of a capture its final name, and remove layers that are not part of it. Idempotent.

    :raises IntegrityError: the new file is gone
    """
    new, final = directory / files.MEMORY_NEW, memory_paths(directory, capture)[-1]
    with os_errors(f"put {final} into place"):
        if new.exists():
            new.chmod(IMMUTABLE)
            new.rename(final)
        for name in LAYERS[len(capture.layers) :]:
            (directory / name).unlink(missing_ok=True)


def captured_here(capture: Capture, directory: Path, disk_layers: LayersByName) -> Capture:
    """Return the capture with the disks of its holder in `directory`."""
    return msgspec.structs.replace(capture, disk_stamp=disk_stamp(directory, disk_layers))


def make_durable(directory: Path, machine: MachineSpec) -> None:
    """Sync a directory with placed files, so that they survive a power cut.

    :raises NoSpace: the file system has no space for delayed allocations
    """
    with os_errors(f"make {directory} durable"):
        sync_captured(directory, machine)


def make_contents_durable(directory: Path, machine: MachineSpec, *, of_durable: bool) -> None:
    """Do as `make_durable` does, but leave the name of the directory itself to the caller.

    :param of_durable: the source's memory and device state are durable, so links to them need no sync
    :raises NoSpace: the file system has no space for delayed allocations
    """
    with os_errors(f"make {directory} durable"):
        _sync_contents(directory, machine, but_links_to=_MEMORY if of_durable else ())


def sync_captured(directory: Path, machine: MachineSpec) -> list[Path]:
    """Sync the memory, device state and disks in `directory` that exist, and their names.

    :return: the paths of these files
    :raises OSError: a sync failed
    """
    present = _sync_contents(directory, machine)
    sync(directory.parent)
    return present


def _sync_contents(directory: Path, machine: MachineSpec, but_links_to: Collection[str] = ()) -> list[Path]:
    names = set(os.listdir(directory))  # noqa: PTH208 - a fork does this many times
    captured = dict.fromkeys((*CAPTURED, *disks.among(names, machine)))
    present = [directory / name for name in captured if name in names]
    for path in present:
        if path.name not in but_links_to or path.lstat().st_nlink == 1:
            sync(path)
    sync(directory)
    return present


def require_saved(directory: Path, machine: MachineSpec, mem_file: MemFile) -> None:
    """Refuse a capture that the VMM has not saved completely.

    :raises IntegrityError: the device state is missing or empty, or the memory is incomplete
    """
    vmstate = directory / files.VMSTATE_NEW
    if not vmstate.exists() or vmstate.stat().st_size == 0:
        raise IntegrityError("the VMM has not saved its device state", hint=_SEE_LOG)
    if mem_file.size_bytes != machine.memory_bytes:
        raise IntegrityError(
            f"the VMM has saved {mem_file.size_bytes} of {machine.memory_bytes} bytes of memory", hint=_SEE_LOG
        )


def sync_capture(directory: Path, instance: Instance, mem_file: MemFile, memory: Path) -> None:
    """Make a capture durable before its commit. After the commit only names change.

    :raises IntegrityError: the device state is missing or empty, or the memory is incomplete
    :raises NoSpace: the file system has no space for delayed allocations
    """
    require_saved(directory, instance.machine, mem_file)
    vmstate = directory / files.VMSTATE_NEW
    # All files of the disks: a VMM that was interrupted in a switch may still write to the last but one.
    written = disks.paths(directory, disks.of(instance))
    with os_errors(f"make the capture in {directory} durable"):
        for path in (memory, vmstate, *written):
            sync(path)
        sync(directory)


@os_errors("remove files of a VMM that has ended")
def clear_runtime(directory: Path) -> None:
    """Remove the files that only a running VMM or an unfinished capture needs. Idempotent."""
    for name in _RUNTIME:
        (directory / name).unlink(missing_ok=True)
    for path in [path for path in directory.iterdir() if path.suffix == _SOCKET] if directory.exists() else []:
        path.unlink(missing_ok=True)
    clear_temporaries(directory)


@os_errors("shorten a log")
def trim_logs(directory: Path) -> None:
    """Cut large logs down to their newest lines. Idempotent. Call it before a VMM starts to write
    them.

    Logs continue from start to start, and the VMM's file size limit applies to them: a full log
    would never get another line.
    """
    for name in (files.CONSOLE_LOG, files.VMM_LOG):
        if console.size(directory, of=name) > LOG_KEPT:
            path = directory / name
            with path.open("rb") as log:
                log.seek(-LOG_KEPT, os.SEEK_END)
                log.readline()  # skip a partial line
                newest = log.read()
            new = temporary_beside(path)
            try:
                new.write_bytes(newest)
                new.rename(path)
            except OSError:  # a full disk must not prevent the start: keep the log as it is
                new.unlink(missing_ok=True)


@os_errors("remove temporary files")
def clear_temporaries(directory: Path) -> None:
    """Remove a killed process's half-written files. Idempotent; the caller holds the lock."""
    if directory.exists():
        for path in [path for path in directory.iterdir() if is_temporary(path.name)]:
            path.unlink(missing_ok=True)


@os_errors("remove captured files")
def clear_capture(directory: Path) -> None:
    """Remove this instance's links to its memory and vmstate. Idempotent."""
    for name in (files.MEMORY, *LAYERS, files.VMSTATE):
        (directory / name).unlink(missing_ok=True)


@os_errors("remove a directory")
def remove(directory: Path) -> None:
    """Remove a directory or file. Idempotent.

    It is renamed first, so that a half-removed directory never has an instance's name.
    """
    doomed = directory if directory.name.startswith(".") else directory.with_name(f".{directory.name}{_REMOVED}")
    with contextlib.suppress(FileNotFoundError):
        directory.rename(doomed)
    with contextlib.suppress(OSError):
        _remove_flat(doomed)
        return
    if doomed.is_dir() and not doomed.is_symlink():
        for _ in range(_REMOVALS):
            shutil.rmtree(doomed, ignore_errors=True)
            if not doomed.exists():
                break
    else:
        doomed.unlink(missing_ok=True)


def _remove_flat(directory: Path) -> None:
    """Remove a directory without subdirectories, as most are: `shutil.rmtree` takes twice as long.

    :raises OSError: it is another file, has a directory in it, or changes meanwhile
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(descriptor):  # noqa: PTH208 - a descriptor
            os.unlink(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    directory.rmdir()


@os_errors("look at the disks")
def disk_stamp(directory: Path, disk_layers: LayersByName) -> str:
    """Return a stamp of the disks' content: it changes if the overlay or a volume is written to."""
    return _stamp(directory, disk_layers, os.listdir(directory))  # noqa: PTH208 - as above


def _stamp(directory: Path, disk_layers: LayersByName, present: Collection[str]) -> str:
    return " ".join(file_stamp(f"{directory}/{name}") for name in disks.stamped(disk_layers, present))


@os_errors("look at a disk")
def file_stamp(path: Path | str) -> str:
    """Return a stamp of a file's content: it changes if the file is written to or replaced."""
    status = os.stat(path)  # noqa: PTH116 - a fork does this many times
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


@os_errors("look at captured files")
def capture_is_current(directory: Path, instance: Instance) -> bool:
    """Return whether there is a capture whose memory, vmstate and disks exist and are still from one instant."""
    if instance.capture is None:
        return False
    capture, layers = instance.capture, instance.disk_layers
    try:
        present = set(os.listdir(directory))  # noqa: PTH208 - a fork does this many times
    except FileNotFoundError:
        return False
    needed = (*_memory_names(capture), files.VMSTATE, *disks.stamped(layers, present))
    return present.issuperset(needed) and _stamp(directory, layers, present) == capture.disk_stamp


def require_current(directory: Path, instance: Instance) -> None:
    """Refuse a capture whose disk has changed: the file system would not match the guest's memory.

    :raises IntegrityError: memory, vmstate or disk is missing, or a disk was written to since the
        capture
    """
    if not capture_is_current(directory, instance):
        raise IntegrityError(
            f"the memory and disks of {instance.name} do not belong together: a file is missing, or a disk was written to",
            hint="another program changed its directory: run `coppice rm NAME`, and capture its source again",
        )


def _link(source: Path | str, destination: Path | str) -> None:
    if not os.path.lexists(destination):
        link_or_copy(source, destination)


def sharing_of(capture: Capture | None) -> Sharing | None:
    """Return how the instance got its memory; None if it has none."""
    return (capture.copied or capture.mem_file).sharing if capture else None


def exists(directory: Path) -> bool:
    """Return whether the instance has its files."""
    return os.path.lexists(directory / files.OVERLAY_DISK)
