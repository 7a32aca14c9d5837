"""QEMU makes, merges and flattens layers, and follows no name in a layer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from coppice.errors import HostCannot, NoSpace
from coppice.linux.clone import clone_file
from coppice.linux.extents import data_ranges
from coppice.model import MIB
from coppice.vmm.qemu import images

SIZE = 64 * MIB


def base_of(path: Path) -> Path:
    """Make a raw file with some content."""
    with path.open("xb") as file:
        file.truncate(SIZE)
        file.seek(8 * MIB)
        file.write(random.Random(0).randbytes(MIB))
    path.chmod(0o444)
    return path


def layer_with(path: Path, below: list[Path], at: int, byte: int, length: int = 4096) -> Path:
    """Make a layer over other files, with a run of one byte at a position."""
    images.create(path, SIZE)
    flags = [*((each, os.O_RDONLY) for each in below), (path, os.O_RDWR)]
    with images.opened(flags) as descriptors, images.Tool(descriptors) as tool:
        tool.chain(writable=True)
        line = f'qemu-io disk "write -P {byte} {at} {length}"'
        said = tool.execute("human-monitor-command", {"command-line": line})
        assert "wrote" in said or not said, said
    path.chmod(0o444)
    return path


def allocated(path: Path) -> int:
    """Return the bytes of data in a file."""
    with path.open("rb") as file:
        return sum(length for _, length in data_ranges(file.fileno(), path.stat().st_size))


def test_layers_are_merged_and_flattened(tmp_path: Path) -> None:
    """Each layer covers those below it; the merged layer needs the raw file alone, and holes stay holes."""
    base = base_of(tmp_path / "base")
    one = layer_with(tmp_path / "one", [base], 8 * MIB, 1, MIB // 2)
    two = layer_with(tmp_path / "two", [base, one], 8 * MIB + 4096, 2)
    top = layer_with(tmp_path / "top", [base, one, two], 40 * MIB, 3)
    wanted = bytearray(base.read_bytes())
    wanted[8 * MIB : 8 * MIB + MIB // 2] = b"\x01" * (MIB // 2)
    wanted[8 * MIB + 4096 : 8 * MIB + 8192] = b"\x02" * 4096
    wanted[40 * MIB : 40 * MIB + 4096] = b"\x03" * 4096
    images.flatten(base, [one, two, top], tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes() == wanted
    assert allocated(tmp_path / "flat") <= 2 * MIB
    clone_file(one, tmp_path / "merged")
    images.merge(base, tmp_path / "merged", [two, top])
    images.flatten(base, [tmp_path / "merged"], tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == wanted


def test_small_writes_are_merged(tmp_path: Path) -> None:
    """Clusters of which layers have different parts are put together: no part comes from a lower layer."""
    base = base_of(tmp_path / "base")
    wanted = bytearray(base.read_bytes())
    layers: list[Path] = []
    for number, byte in enumerate((1, 2, 3)):
        at = 2 * MIB + number * 6144  # all in one cluster of 64 KiB, and each over a part of the one before
        layers.append(layer_with(tmp_path / f"layer{number}", [base, *layers], at, byte, 8192))
        wanted[at : at + 8192] = bytes([byte]) * 8192
    clone_file(layers[0], tmp_path / "merged")
    images.merge(base, tmp_path / "merged", layers[1:])
    images.flatten(base, [tmp_path / "merged"], tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes() == wanted


def test_a_small_write_copies_little(tmp_path: Path) -> None:
    """A guest that writes a page does not copy a cluster of its source's disk."""
    base = base_of(tmp_path / "base")
    images.create(tmp_path / "empty", SIZE)
    layer = layer_with(tmp_path / "layer", [base], 8 * MIB + 8192, 1)
    sparse = tmp_path / "sparse"
    clone_file(layer, sparse, reflink=False)
    clone_file(tmp_path / "empty", tmp_path / "nothing", reflink=False)
    assert allocated(tmp_path / "nothing") <= 16384
    assert allocated(sparse) - allocated(tmp_path / "nothing") <= 16384


def test_names_in_a_layer_are_not_followed(tmp_path: Path) -> None:
    """A guest that controls its VMM can write any header: it reads no other file of the host."""
    base = base_of(tmp_path / "base")
    secret = tmp_path / "secret"
    secret.write_bytes(b"\x5a" * SIZE)
    layer = layer_with(tmp_path / "layer", [base], 0, 1)
    layer.chmod(0o600)
    name = str(secret).encode()
    with layer.open("r+b") as file:
        file.seek(8)
        file.write((1024).to_bytes(8, "big") + len(name).to_bytes(4, "big"))  # the backing file's name
        file.seek(1024)
        file.write(name)
    images.flatten(base, [layer], tmp_path / "flat")
    assert b"\x5a" * 4096 not in (tmp_path / "flat").read_bytes()


def test_a_damaged_layer_is_an_error(tmp_path: Path) -> None:
    """QEMU's reason is in the message, and no process stays."""
    base = base_of(tmp_path / "base")
    (tmp_path / "layer").write_bytes(b"no layer" * 4096)
    with pytest.raises(HostCannot, match="qcow2") as refusal:
        images.flatten(base, [tmp_path / "layer"], tmp_path / "flat")
    assert not isinstance(refusal.value, NoSpace)
