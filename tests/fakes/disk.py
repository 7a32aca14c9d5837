"""Disk layers of the fake VMM: a layer is a sparse file, and its holes show the file below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from coppice.errors import VmmError
from coppice.linux.clone import clone_file
from coppice.linux.extents import data_ranges
from coppice.linux.files import temporary_beside
from coppice.vmm import driver as files
from coppice.vmm.driver import Launch

FORMAT = "fake"
_USED = "fake-disk"  # the names of the files that the VMM uses
_NEXT = "fake-disk-next"  # the name of the layer that it has opened


def make(path: Path, size_bytes: int) -> None:
    """Make an empty layer."""
    with path.open("xb") as file:
        file.truncate(size_bytes)


def merge(merged: Path, above: Sequence[Path]) -> None:
    """Write what the layers `above` have to `merged`, which is below them."""
    _write(merged, above)


def flatten(base: Path, layers: Sequence[Path], out: Path) -> None:
    """Write a whole disk to a new file."""
    clone_file(base, out)
    _write(out, layers)


def use(directory: Path, names: Sequence[str]) -> None:
    """Let a machine use a disk of these files, from the raw one on: it writes to the last one."""
    path = directory / _USED
    new = temporary_beside(path)
    new.write_text(" ".join(names))
    new.rename(path)


def launch(launch: Launch) -> None:
    """Let a machine use the disk that it is started with."""
    (overlay,) = [each for each in launch.disks if each.serial == files.OVERLAY]
    use(launch.directory, [*overlay.below, overlay.path])


def files_in(directory: Path) -> list[Path]:
    """Return the files of the overlay disk that a running machine uses, the topmost one first."""
    return [directory / name for name in reversed((directory / _USED).read_text().split())]


def require_top(directory: Path, name: str) -> None:
    """Refuse an order about another disk than the one that the machine writes to."""
    if files_in(directory)[0].name != name:
        raise VmmError("the fake VMM has another disk", hint="see the test")


def open_next(directory: Path, name: str) -> None:
    """Open an empty layer, which the machine does not use yet."""
    assert not any(data_ranges_of(directory / name)), "the layer is not empty"
    (directory / _NEXT).write_text(name)


def require_open(directory: Path, name: str) -> None:
    """Assert that the VMM has opened a layer before the pause."""
    assert (directory / _NEXT).read_text() == name, "the VMM has not opened the layer"


def data_ranges_of(path: Path) -> list[tuple[int, int]]:
    """Return the ranges of a file that are not holes."""
    with path.open("rb") as file:
        return list(data_ranges(file.fileno(), path.stat().st_size))


def _write(out: Path, layers: Sequence[Path]) -> None:
    with out.open("r+b") as target:
        for layer in layers:
            with layer.open("rb") as source:
                for start, length in data_ranges(source.fileno(), os.fstat(source.fileno()).st_size):
                    os.pwrite(target.fileno(), os.pread(source.fileno(), length, start), start)
