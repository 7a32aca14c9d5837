"""Disk layers of the fake VMM: a layer is a sparse file, and its holes show the file below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from coppice.errors import VmmError
from coppice.linux.clone import clone_file
from coppice.linux.extents import data_ranges
from coppice.linux.files import temporary_beside
from coppice.vmm.driver import Launch

FORMAT = "fake"
_USED = "fake-disk"  # the names of the files that the VMM uses, a line for each disk
_NEXT = "fake-disk-next"  # the names of the layers that it has opened


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


def use(directory: Path, *disks: Sequence[str]) -> None:
    """Let a machine use disks of these files, from the raw one on, in place of what it used of them: it
    writes to the last one of each.
    """
    path = directory / _USED
    used = in_use(directory) | {files[0]: tuple(files) for files in disks}
    new = temporary_beside(path)
    new.write_text("".join(f"{' '.join(files)}\n" for files in used.values()))
    new.rename(path)


def launch(launch: Launch) -> None:
    """Let a machine use the disks that it is started with."""
    (launch.directory / _USED).unlink(missing_ok=True)
    use(launch.directory, *([*each.below, each.path] for each in launch.disks))


def in_use(directory: Path) -> dict[str, tuple[str, ...]]:
    """Return the names of the files of each disk that a running machine uses, by that of the raw one."""
    path = directory / _USED
    lines = path.read_text().splitlines() if path.exists() else []
    return {files[0]: files for files in (tuple(line.split()) for line in lines)}


def files_in(directory: Path, name: str) -> list[Path]:
    """Return the files of a disk that a running machine uses, the topmost one first."""
    return [directory / file for file in reversed(in_use(directory)[f"{name}.raw"])]


def require_top(directory: Path, disk: Sequence[str], name: str) -> None:
    """Refuse an order about another disk than the one that the machine writes to."""
    if in_use(directory).get(disk[0], ("",))[-1] != name:
        raise VmmError("the fake VMM has another disk", hint="see the test")


def open_next(directory: Path, name: str) -> None:
    """Open an empty layer, which the machine does not use yet."""
    assert not any(data_ranges_of(directory / name)), "the layer is not empty"
    with (directory / _NEXT).open("a") as file:
        file.write(f"{name}\n")


def require_open(directory: Path, name: str) -> None:
    """Assert that the VMM has opened a layer before the pause."""
    assert name in (directory / _NEXT).read_text().split(), "the VMM has not opened the layer"


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
