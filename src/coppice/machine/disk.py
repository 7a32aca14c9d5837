"""One writable disk of an instance or snapshot: a raw file, and thin layers over it. All functions block.

A file of a disk is either written by its one machine, or frozen: mode 0444, never changed again.
Frozen files are shared by hard links. Only the topmost file can be the machine's own. A fork
freezes its source's topmost file, links all files, and puts an empty layer of its own on top. The
source gets a new layer too, before it runs again.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from coppice.content.overlay import OverlayStore
from coppice.linux.clone import clone_file, reflink_file
from coppice.linux.files import os_errors, sync, temporary_beside
from coppice.linux.link import IMMUTABLE, link_or_copy
from coppice.vmm.driver import RAW, VmmDriver

MOST = 8
"""Layers over one raw file, at most. Those of a disk with so many are merged before others are made of it."""

_EMPTY_LAYER = 64 << 10  # bytes allocated, at most

Layers = tuple[int, ...]
"""The numbers of a disk's layers, lowest first. A new layer gets the next number, so that no name is used again."""


class Disk(NamedTuple):
    """A disk, which consists of the files NAME.raw, NAME.1..."""

    name: str
    size_bytes: int
    layers: Layers = ()

    @property
    def files(self) -> list[str]:
        """The names of its files: the raw one, and its layers from the lowest on."""
        return [self.name + RAW, *(f"{self.name}.{number}" for number in self.layers)]

    def paths(self, directory: Path) -> list[Path]:
        """Return the paths of its files, as `files`."""
        return [directory / name for name in self.files]

    def made_of(self, files: Iterable[str]) -> Disk:
        """Return the disk as it is if it has these files."""
        return self._replace(layers=tuple(int(name.rpartition(".")[2]) for name in files if name != self.files[0]))

    @property
    def is_full(self) -> bool:
        """Whether the disk can have no further layer until its layers are merged."""
        return len(self.layers) >= MOST

    @property
    def below(self) -> Disk:
        """The disk without its topmost layer."""
        return self._replace(layers=self.layers[:-1])

    @property
    def _next(self) -> int:
        return max(self.layers, default=0) + 1


class Placed(NamedTuple):
    """A disk that was placed, and the bytes written for it."""

    disk: Disk
    bytes_written: int


def frozen(path: Path) -> bool:
    """Return whether nothing may write to a file of a disk any more."""
    return not path.lstat().st_mode & 0o222


def freeze(path: Path) -> None:
    """Make a file of a disk that no machine runs on immutable. Idempotent."""
    if stat.S_IMODE(path.lstat().st_mode) != IMMUTABLE:
        path.chmod(IMMUTABLE)


@os_errors("place a disk")
def fork(
    source: Path,
    directory: Path,
    disk: Disk,
    drivers: tuple[VmmDriver, VmmDriver],
    overlays: OverlayStore,
    *,
    starts: bool,
) -> Placed:
    """Give a directory the disk of another one, which no machine runs on, with a topmost file of its own.

    By reflink, if the file system can; else as a layer; else, if one of the VMMs needs a raw file, as
    a copy. A machine that is not started does not get the last layer that fits, since it would be a source
    that cannot be forked without a merge. It gets that layer at its start (see `own`).

    :param disk: the source's. If it is full, its layers are merged for this fork alone: see `rest_disk`
    :param drivers: the source's and the new machine's
    :param starts: whether the new machine is started now
    :raises NoSpace: the disk is full
    """
    of_source, own = drivers
    common = of_source.capabilities.layer_format == own.capabilities.layer_format
    *below, top = disk.paths(source)
    if (common or not disk.layers) and reflink_file(top, directory / top.name):
        return Placed(disk, _link(below, directory))
    if not common or not own.capabilities.layer_format:
        return Placed(disk._replace(layers=()), _copy(source, directory, disk, of_source))
    freeze(top)
    if disk.is_full:
        written = _link(below[:1], directory)
        disk, more = _merge(source, directory, disk, own, disk._next)
        written += more
    else:
        written = _link([*below, top], directory)
        if not starts and len(disk.layers) == MOST - 1:
            return Placed(disk, written)
    disk, more = _put_layer(directory, disk, own, overlays)
    return Placed(disk, written + more)


@os_errors("share a disk")
def share(source: Path, directory: Path, disk: Disk, driver: VmmDriver) -> None:
    """Give a snapshot's directory the disk of an instance that no machine runs on. Nothing writes to it."""
    *below, top = disk.paths(source)
    if not driver.capabilities.layer_format:
        clone_file(top, directory / top.name, mode=IMMUTABLE, sync=False)
    elif not reflink_file(top, directory / top.name, mode=IMMUTABLE):
        freeze(top)
        below.append(top)
    _link(below, directory)


@os_errors("copy the disk of a running machine")
def copy_running(source: Path, directory: Path, disk: Disk) -> None:
    """Give a directory the disk of a paused machine: links to all files but the topmost, which is copied."""
    *below, top = disk.paths(source)
    _link(below, directory)
    clone_file(top, directory / top.name, sync=False)


@os_errors("add a layer to a disk")
def add_layer(directory: Path, disk: Disk, driver: VmmDriver, overlays: OverlayStore) -> Disk:
    """Make a layer over the disk of a running machine, empty and durable. Nothing uses it yet.

    :return: the disk with the new layer
    :raises NoSpace: the disk is full
    """
    disk, _ = _put_layer(directory, disk, driver, overlays)
    _sync_files(directory, disk.files[-1:])
    return disk


@os_errors("merge layers of a disk")
def merge_below(directory: Path, disk: Disk, driver: VmmDriver) -> Disk:
    """Merge all layers of a running machine's disk but the topmost one into a new one. Durable. Nothing uses it yet.

    :return: the disk with the merged layer
    :raises NoSpace: the disk is full
    """
    merged, _ = _merge(directory, directory, disk.below, driver, disk._next)
    _sync_files(directory, merged.files[-1:])
    return merged._replace(layers=(*merged.layers, disk.layers[-1]))


@os_errors("merge layers of a disk")
def merge_all(directory: Path, disk: Disk, driver: VmmDriver) -> Disk:
    """Merge all layers of a disk, which no machine runs on, into a new one. Durable. No record names it yet.

    :return: the disk with the merged layer, which is frozen
    :raises NoSpace: the disk is full
    """
    merged, _ = _merge(directory, directory, disk, driver, disk._next)
    _sync_files(directory, merged.files[-1:])
    return merged


@os_errors("share the disk of a running machine")
def share_running(source: Path, directory: Path, disk: Disk) -> None:
    """Give a directory the disk of a machine that has gone on in a new layer, and freeze its files."""
    _link(disk.paths(source), directory)


@os_errors("look at a disk")
def is_frozen(directory: Path, disk: Disk) -> bool:
    """Return whether a machine at rest needs a disk of its own before it runs."""
    return frozen(disk.paths(directory)[-1])


@os_errors("give a machine a disk of its own")
def own(directory: Path, disk: Disk, driver: VmmDriver, overlays: OverlayStore) -> Disk:
    """Give a directory, whose topmost file is frozen, one that its machine may write. Durable.

    The files that were there remain until they are removed, so the caller can record the result first.

    :return: the disk that the machine starts with
    """
    top = disk.paths(directory)[-1]
    if not driver.capabilities.layer_format:
        if top.stat().st_nlink > 1:
            clone_file(top, top)
        else:  # an imported one; a new file would no longer be that of its capture until the record is saved
            top.chmod(0o600)
        return disk
    if disk.is_full:  # its layers could not be merged before
        disk, _ = _merge(directory, directory, disk, driver, disk._next)
    disk, _ = _put_layer(directory, disk, driver, overlays)
    _sync_files(directory, disk.files[-2:])
    return disk


@contextlib.contextmanager
def flat(directory: Path, disk: Disk, driver: VmmDriver) -> Iterator[Path]:
    """Yield the path of a raw file with the content of a disk. It is a temporary one if the disk has layers."""
    base, *above = disk.paths(directory)
    if not above:
        yield base
        return
    out = temporary_beside(base)
    try:
        driver.flatten_disk(base, above, out)
        yield out
    finally:
        out.unlink(missing_ok=True)


def allocated(of: Iterable[Path]) -> int:
    """Return the allocated bytes of files, shared ones included; 0 for those that do not exist."""
    return sum(_allocated(path) for path in of)


def bytes_of_fork(directory: Path, disk: Disk, drivers: tuple[VmmDriver, VmmDriver]) -> int:
    """Return the most bytes that `fork` writes without reflinks."""
    of_source, own = (driver.capabilities.layer_format for driver in drivers)
    if not own or own != of_source:
        return allocated(disk.paths(directory))
    return _EMPTY_LAYER + bytes_of_merge(directory, disk)


def bytes_of_own(directory: Path, disk: Disk, driver: VmmDriver) -> int:
    """Return the most bytes that a start writes to give a machine at rest a disk of its own, as `own` does."""
    top = disk.paths(directory)[-1]
    if not top.exists() or not frozen(top):
        return 0
    if not driver.capabilities.layer_format:
        return _allocated(top)
    return _EMPTY_LAYER + bytes_of_merge(directory, disk)


def bytes_of_share(directory: Path, disk: Disk, driver: VmmDriver) -> int:
    """Return the most bytes that `share` writes without reflinks."""
    return 0 if driver.capabilities.layer_format else allocated(disk.paths(directory))


def bytes_of_running(directory: Path, disk: Disk, driver: VmmDriver) -> int:
    """Return the most bytes that a capture of a running machine writes for its disk without reflinks."""
    if not driver.capabilities.switches_layers:
        return _allocated(disk.paths(directory)[-1])
    return _EMPTY_LAYER + bytes_of_merge(directory, disk)


def bytes_of_merge(directory: Path, disk: Disk) -> int:
    """Return the most bytes that a merge of a disk's layers writes; 0 if it is not full."""
    return allocated(disk.paths(directory)[1:]) if disk.is_full else 0


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _link(sources: Sequence[Path], directory: Path) -> int:
    return sum(link_or_copy(path, directory / path.name).bytes_written for path in sources)


def _sync_files(directory: Path, names: Sequence[str]) -> None:
    """Sync files of a disk and all names that lead to them: a volume's data may be in them after a power cut."""
    for name in names:
        sync(directory / name)
    sync(directory)
    sync(directory.parent)


def _copy(source: Path, directory: Path, disk: Disk, driver: VmmDriver) -> int:
    base, *above = disk.paths(source)
    if not above:
        return clone_file(base, directory / base.name, sync=False).bytes_written
    driver.flatten_disk(base, above, directory / base.name)
    return (directory / base.name).stat().st_blocks * 512


def _merge(source: Path, directory: Path, disk: Disk, driver: VmmDriver, number: int) -> Placed:
    """Merge the layers of a disk into one of that number, which is frozen, in `directory`."""
    base, lowest, *above = disk.paths(source)
    merged = disk._replace(layers=(number,))
    final = merged.paths(directory)[-1]
    temporary = temporary_beside(final)
    try:
        clone_file(lowest, temporary, sync=False)
        driver.merge_layers(base, temporary, above)
        temporary.chmod(IMMUTABLE)
        temporary.rename(final)
    finally:
        temporary.unlink(missing_ok=True)
    return Placed(merged, final.stat().st_blocks * 512)


def _put_layer(directory: Path, disk: Disk, driver: VmmDriver, overlays: OverlayStore) -> Placed:
    disk = disk._replace(layers=(*disk.layers, disk._next))
    top = disk.paths(directory)[-1]
    form = driver.capabilities.layer_format
    written = overlays.create_layer(disk.size_bytes, form, driver.make_layer, top).bytes_written
    return Placed(disk, written)
