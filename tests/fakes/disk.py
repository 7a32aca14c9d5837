"""Disk layers of the fake VMM: a layer is a sparse file, and its holes show the file below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from coppice.linux.clone import clone_file
from coppice.linux.extents import data_ranges
from coppice.linux.files import temporary_beside
from coppice.vmm import driver as files

FORMAT = "fake"


def make(path: Path, size_bytes: int) -> None:
    """Make an empty layer."""
    with path.open("xb") as file:
        file.truncate(size_bytes)


def merge(layers: Sequence[Path], top: Path) -> None:
    """Write what `layers` have, and `top` has not, to `top`."""
    own = temporary_beside(top)
    clone_file(top, own)
    _write(top, [*layers, own])
    own.unlink()


def flatten(base: Path, layers: Sequence[Path], out: Path) -> None:
    """Write a whole disk to a new file."""
    clone_file(base, out)
    _write(out, layers)


def files_in(directory: Path) -> list[Path]:
    """Return the files of the overlay disk of a running machine, the topmost one first."""
    base = directory / files.OVERLAY_DISK
    layers = [path for path in directory.glob(f"{base.stem}.*") if path.suffix[1:].isdigit()]
    return [*sorted(layers, key=lambda path: -int(path.suffix[1:])), base]


def _write(out: Path, layers: Sequence[Path]) -> None:
    with out.open("r+b") as target:
        for layer in layers:
            with layer.open("rb") as source:
                for start, length in data_ranges(source.fileno(), os.fstat(source.fileno()).st_size):
                    os.pwrite(target.fileno(), os.pread(source.fileno(), length, start), start)
