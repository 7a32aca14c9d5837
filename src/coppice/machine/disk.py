"""The writable disk of an instance or snapshot: a raw file, and thin layers over it. All functions block.

A file of a disk is either written by its one machine, or frozen: mode 0444, never changed again.
Frozen files are shared by hard links. Only the topmost file can be the machine's own. A fork
freezes its source's topmost file, links all files, and puts an empty layer of its own on top. The
source gets a new layer too, before it runs again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from coppice.content.overlay import OverlayStore
from coppice.linux.clone import clone_file, reflink_file
from coppice.linux.files import os_errors, sync, temporary_beside
from coppice.linux.link import IMMUTABLE, link_or_copy
from coppice.vmm import driver as files
from coppice.vmm.driver import VmmDriver

MOST = 8
"""Layers over one raw file, at most. A fork of a disk with so many merges them into one."""

_EMPTY_LAYER = 64 << 10  # bytes allocated, at most
_LAYER = f"{Path(files.OVERLAY_DISK).stem}.{{}}"
_PREFIX = _LAYER.format("")

Layers = tuple[int, ...]
"""The numbers of a disk's layers, lowest first. A new layer gets the next number, so that no name is used again."""


class Placed(NamedTuple):
    """The layers of a disk that was placed, and the bytes written for it."""

    layers: Layers
    bytes_written: int


def paths(directory: Path, layers: Layers) -> list[Path]:
    """Return the paths of a disk's files: the raw one, and its layers from the lowest on."""
    return [directory / name for name in names(layers)]


def names_in(directory: Path) -> list[str]:
    """Return the names of all files of disks in a directory, recorded or not."""
    try:
        return among(os.listdir(directory))  # noqa: PTH208 - a fork does this many times
    except FileNotFoundError:
        return []


def among(names: Iterable[str]) -> list[str]:
    """Return those names that are of a disk's files, in order."""
    return sorted(name for name in names if name.startswith(_PREFIX))


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
    layers: Layers,
    size_bytes: int,
    drivers: tuple[VmmDriver, VmmDriver],
    overlays: OverlayStore,
) -> Placed:
    """Give a directory the disk of another one, which no machine runs on, with a topmost file of its own.

    By reflink, if the file system can; else as a layer; else, if one of the VMMs needs a raw file, as
    a copy.

    :param layers: the source's
    :param drivers: the source's and the new machine's
    :raises NoSpace: the disk is full
    """
    of_source, own = drivers
    common = of_source.capabilities.layer_format == own.capabilities.layer_format
    *below, top = paths(source, layers)
    if (common or not layers) and reflink_file(top, directory / top.name):
        return Placed(layers, _link(below, directory))
    if not common or not own.capabilities.layer_format:
        return Placed((), _copy(source, directory, layers, of_source))
    freeze(top)
    if len(layers) < MOST:
        written = _link([*below, top], directory)
    else:
        written = _link(below[:1], directory)
        layers, more = _merge(source, directory, layers, own, _next(layers))
        written += more
    layers, more = _put_layer(directory, layers, size_bytes, own, overlays)
    return Placed(layers, written + more)


@os_errors("share a disk")
def share(source: Path, directory: Path, layers: Layers, driver: VmmDriver) -> Placed:
    """Give a snapshot's directory the disk of an instance that no machine runs on. Nothing writes to it."""
    *below, top = paths(source, layers)
    if driver.capabilities.layer_format and not reflink_file(top, directory / top.name, mode=IMMUTABLE):
        freeze(top)
        return Placed(layers, _link([*below, top], directory))
    if not driver.capabilities.layer_format:
        return Placed(layers, clone_file(top, directory / top.name, mode=IMMUTABLE, sync=False).bytes_written)
    return Placed(layers, _link(below, directory))


@os_errors("copy the disk of a running machine")
def copy_running(source: Path, directory: Path, layers: Layers) -> None:
    """Give a directory the disk of a paused machine: links to all files but the topmost, which is copied."""
    *below, top = paths(source, layers)
    _link(below, directory)
    clone_file(top, directory / top.name, sync=False)


def names(layers: Layers) -> list[str]:
    """Return the names of a disk's files: the raw one, and its layers from the lowest on."""
    return [files.OVERLAY_DISK, *(_LAYER.format(number) for number in layers)]


def layers_of(names: Iterable[str]) -> Layers:
    """Return the layers of a disk whose files have these names."""
    return tuple(int(name.removeprefix(_PREFIX)) for name in names if name != files.OVERLAY_DISK)


@os_errors("add a layer to a disk")
def add_layer(directory: Path, layers: Layers, size_bytes: int, driver: VmmDriver, overlays: OverlayStore) -> Layers:
    """Make a layer over the disk of a running machine, empty and durable. Nothing uses it yet.

    :return: the layers with the new one
    :raises NoSpace: the disk is full
    """
    layers, _ = _put_layer(directory, layers, size_bytes, driver, overlays)
    sync(paths(directory, layers)[-1])
    sync(directory)
    return layers


@os_errors("merge layers of a disk")
def merge_below(directory: Path, layers: Layers, driver: VmmDriver) -> Layers:
    """Merge all layers of a running machine's disk but the topmost one into a new one. Durable. Nothing uses it yet.

    :return: the layers with the merged one
    :raises NoSpace: the disk is full
    """
    merged, _ = _merge(directory, directory, layers[:-1], driver, _next(layers))
    sync(paths(directory, merged)[-1])
    sync(directory)
    return (*merged, layers[-1])


@os_errors("share the disk of a running machine")
def share_running(source: Path, directory: Path, layers: Layers) -> None:
    """Give a directory the disk of a machine that has gone on in a new layer, and freeze its files."""
    _link(paths(source, layers), directory)


@os_errors("look at a disk")
def is_frozen(directory: Path, layers: Layers) -> bool:
    """Return whether a machine at rest needs a disk of its own before it runs."""
    return frozen(paths(directory, layers)[-1])


@os_errors("give a machine a disk of its own")
def own(directory: Path, layers: Layers, size_bytes: int, driver: VmmDriver, overlays: OverlayStore) -> Layers:
    """Give a directory, whose topmost file is frozen, one that its machine may write. Durable.

    The files that were there remain until `remove_others`, so the caller can record the result first.

    :return: the layers that the machine starts with
    """
    top = paths(directory, layers)[-1]
    if not driver.capabilities.layer_format:
        clone_file(top, top)
        return layers
    if len(layers) >= MOST:
        layers, _ = _merge(directory, directory, layers, driver, _next(layers))
    layers, _ = _put_layer(directory, layers, size_bytes, driver, overlays)
    for path in paths(directory, layers)[-2:]:
        sync(path)
    sync(directory)
    return layers


@os_errors("remove layers of a disk")
def remove_others(directory: Path, layers: Layers) -> None:
    """Remove layers that are not part of the recorded disk. Idempotent."""
    kept = {path.name for path in paths(directory, layers)}
    for name in names_in(directory):
        if name not in kept:
            (directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def flat(directory: Path, layers: Layers, driver: VmmDriver) -> Iterator[Path]:
    """Yield the path of a raw file with the content of a disk. It is a temporary one if the disk has layers."""
    base, *above = paths(directory, layers)
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


def bytes_of_fork(directory: Path, layers: Layers, drivers: tuple[VmmDriver, VmmDriver]) -> int:
    """Return the most bytes that `fork` writes without reflinks."""
    of_source, own = (driver.capabilities.layer_format for driver in drivers)
    if not own or own != of_source:
        return allocated(paths(directory, layers))
    merged = allocated(paths(directory, layers)[1:]) if len(layers) >= MOST else 0
    return merged + _EMPTY_LAYER


def bytes_of_share(directory: Path, layers: Layers, driver: VmmDriver) -> int:
    """Return the most bytes that `share` writes without reflinks."""
    return 0 if driver.capabilities.layer_format else allocated(paths(directory, layers))


def bytes_of_running(directory: Path, layers: Layers, driver: VmmDriver) -> int:
    """Return the most bytes that a capture of a running machine writes for its disk without reflinks."""
    if not driver.capabilities.switches_layers:
        return _allocated(paths(directory, layers)[-1])
    return _EMPTY_LAYER + (allocated(paths(directory, layers)[1:]) if len(layers) >= MOST else 0)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _link(sources: Sequence[Path], directory: Path) -> int:
    return sum(link_or_copy(path, directory / path.name).bytes_written for path in sources)


def _copy(source: Path, directory: Path, layers: Layers, driver: VmmDriver) -> int:
    base, *above = paths(source, layers)
    if not above:
        return clone_file(base, directory / base.name, sync=False).bytes_written
    driver.flatten_disk(base, above, directory / base.name)
    return (directory / base.name).stat().st_blocks * 512


def _merge(source: Path, directory: Path, layers: Layers, driver: VmmDriver, number: int) -> Placed:
    """Merge the layers of a disk into one of that number, which is frozen, in `directory`."""
    base, lowest, *above = paths(source, layers)
    merged = (number,)
    final = paths(directory, merged)[-1]
    temporary = temporary_beside(final)
    try:
        clone_file(lowest, temporary, sync=False)
        driver.merge_layers(base, temporary, above)
        temporary.chmod(IMMUTABLE)
        temporary.rename(final)
    finally:
        temporary.unlink(missing_ok=True)
    return Placed(merged, final.stat().st_blocks * 512)


def _next(layers: Layers) -> int:
    return max(layers, default=0) + 1


def _put_layer(directory: Path, layers: Layers, size_bytes: int, driver: VmmDriver, overlays: OverlayStore) -> Placed:
    layers = (*layers, _next(layers))
    top = paths(directory, layers)[-1]
    form = driver.capabilities.layer_format
    return Placed(layers, overlays.create_layer(size_bytes, form, driver.make_layer, top).bytes_written)
