"""Kernel modules: their dependencies and their load order."""

from __future__ import annotations

import contextlib
import gzip
import lzma
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from coppice.boot.modules import MAX_MODULE_BYTES, ModuleTree, parse_modinfo, read_module
from coppice.errors import UsageError
from kernel_files import MODULES, module, module_tree

NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True), max_size=6)


@given(NAMES)
def test_depends_is_read_from_the_module(names: list[str]) -> None:
    """The dependencies come from the kernel's build."""
    assert parse_modinfo(module("some", ",".join(names)))["depends"] == ",".join(names)


@given(st.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    """A file that is not a module is a UsageError, whatever its bytes."""
    with pytest.raises(UsageError):
        parse_modinfo(data)


@given(st.integers(0, len(module("some", "other")) - 1), st.integers(0, 255))
@example(0x2F, 0x80)  # the section table's offset overflows a signed number
def test_a_damaged_module_never_crashes_the_parser(position: int, value: int) -> None:
    """Any single changed byte gives strings or a UsageError."""
    image = bytearray(module("some", "other"))
    image[position] = value
    with contextlib.suppress(UsageError):
        parse_modinfo(bytes(image))


@given(st.integers(0, len(module("some", "other")) - 1))
def test_a_truncated_module_is_refused(length: int) -> None:
    """A truncated module never counts as one without dependencies: its section table is at its end."""
    with pytest.raises(UsageError):
        parse_modinfo(module("some", "other")[:length])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
def test_compressed_modules_are_decompressed(tmp_path: Path, suffix: str, compress: object) -> None:
    """Some distributions compress their modules; the guest gets plain ones."""
    assert callable(compress)
    file = tmp_path / f"some.ko{suffix}"
    file.write_bytes(compress(module("some")))
    assert read_module(file) == module("some")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_corrupt_compression_is_refused(tmp_path: Path, suffix: str) -> None:
    """The error names the damaged file, and a guest never loads it."""
    file = tmp_path / f"some.ko{suffix}"
    file.write_bytes(b"not compressed at all")
    with pytest.raises(UsageError, match="the kernel module"):
        read_module(file)


def test_a_compression_bomb_is_refused(tmp_path: Path) -> None:
    """A small file that decompresses to more than any module is refused without filling the memory."""
    file = tmp_path / "some.ko.xz"
    file.write_bytes(lzma.compress(bytes(MAX_MODULE_BYTES + 1), preset=0))
    with pytest.raises(UsageError, match="larger"):
        read_module(file)


def test_each_module_comes_after_its_dependencies(tmp_path: Path) -> None:
    """The modules can be loaded in that order; built-in and unneeded ones are omitted."""
    tree = ModuleTree(module_tree(tmp_path / "modules"))
    stems = [found.stem for found in tree.resolve(["virtio_mmio", "virtio_rng", "erofs", "ext4", "virtio_blk"])]
    assert set(stems) == {"virtio_ring", "virtio", "virtio_mmio", "virtio-rng", "libcrc32c", "erofs", "virtio_blk"}
    assert len(stems) == len(set(stems))
    needs = {Path(path).name: depends.split(",") for path, depends in MODULES.items()}
    for index, stem in enumerate(stems):
        assert set(filter(None, needs[stem])) <= set(stems[:index])


@pytest.mark.parametrize(
    ("softdep", "first"), [("pre: crc32c", True), ("pre: a-b crypto-crc32c post: late", True), ("post: crc32c", False)]
)
def test_a_modules_run_time_dependency_comes_first(tmp_path: Path, softdep: str, first: bool) -> None:
    """libcrc32c loads only after a module that computes CRC32C. Debian's ordinary kernel builds
    that as a module, and only a soft dependency names it.
    """
    (tmp_path / "libcrc32c.ko").write_bytes(module("libcrc32c", softdep=softdep))
    for name in ("crc32c_generic", "late"):
        (tmp_path / f"{name}.ko").write_bytes(module(name))
    stems = [found.stem for found in ModuleTree(tmp_path).resolve(["libcrc32c"])]
    assert stems == (["crc32c_generic", "libcrc32c"] if first else ["libcrc32c"])
    (tmp_path / "modules.builtin").write_text("kernel/crypto/crc32c_generic.ko\n")
    assert [found.stem for found in ModuleTree(tmp_path).resolve(["libcrc32c"])] == ["libcrc32c"]


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.lists(st.sampled_from("abcdefgh"), max_size=4), min_size=8))
def test_any_graph_is_ordered_or_refused(tmp_path_factory: pytest.TempPathFactory, graph: dict[str, list[str]]) -> None:
    """Any dependencies give a valid order, or a UsageError for a cycle."""
    directory = tmp_path_factory.mktemp("modules")
    for name, depends in graph.items():
        (directory / f"{name}.ko").write_bytes(module(name, ",".join(depends)))
    try:
        stems = [found.stem for found in ModuleTree(directory).resolve(graph)]
    except UsageError:
        with pytest.raises(CycleError):
            TopologicalSorter(graph).prepare()
        return
    assert sorted(stems) == sorted(graph)
    for name, depends in graph.items():
        assert all(stems.index(other) < stems.index(name) for other in depends)


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    """A kernel that cannot run a guest is refused on the host, instead of hanging at boot."""
    with pytest.raises(UsageError, match="virtio_blk"):
        ModuleTree(tmp_path).resolve(["virtio_blk"])
