"""The bzImage: its version, and the uncompressed kernel inside."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import random
import struct
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from coppice.boot.bzimage import STUB_BYTES, kernel_version
from coppice.boot.vmlinux import extract_vmlinux
from coppice.errors import UsageError
from kernel_files import RELEASE, bzimage, vmlinux


def lz4_legacy(plain: bytes) -> bytes:
    """Compress like `lz4 -l` and the kernel's build, in two blocks, with the size appended."""
    library = ctypes.CDLL("liblz4.so.1")
    frame = bytearray(b"\x02\x21\x4c\x18")
    for part in (plain[:1000], plain[1000:]):
        room = ctypes.create_string_buffer(len(part) * 2 + 64)
        length = library.LZ4_compress_default(part, room, len(part), len(room))
        frame += struct.pack("<I", length) + room.raw[:length]
    return bytes(frame) + struct.pack("<I", len(plain))


def sized(plain: bytes, compressed: bytes) -> bytes:
    """Append the size, as the kernel's build does for every format except gzip."""
    return compressed + struct.pack("<I", len(plain))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda plain: sized(plain, lzma.compress(plain)),
    "lzma": lambda plain: sized(plain, lzma.compress(plain, format=lzma.FORMAT_ALONE)),
    "bzip2": lambda plain: sized(plain, bz2.compress(plain)),
    "zstd": lambda plain: sized(plain, zstandard.ZstdCompressor().compress(plain)),
    "lz4": lz4_legacy,
}


def test_the_version_is_read_from_the_image() -> None:
    """The version that is shown and matched with the modules comes from the kernel, not from a file
    name.
    """
    assert kernel_version(bzimage()) == RELEASE


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_truncated_payload_falls_back_to_the_bzimage(name: str) -> None:
    """A truncated kernel would hang in the guest, so it is never extracted."""
    payload = COMPRESSORS[name](vmlinux() + random.Random(1).randbytes(20_000))
    assert extract_vmlinux(bzimage(payload)) is not None
    assert extract_vmlinux(bzimage(payload[: len(payload) // 2])) is None


@pytest.mark.parametrize(
    "image", [b"", b"\x7fELF" + bytes(STUB_BYTES), bzimage()[: STUB_BYTES - 1], bzimage(release="a/b")]
)
def test_other_files_are_refused(image: bytes) -> None:
    """A wrong file is a UsageError when it is added, not a VMM that does not start."""
    with pytest.raises(UsageError):
        kernel_version(image)


@given(st.binary(max_size=64), st.integers(0, 0x300))
def test_damaged_headers_never_crash(data: bytes, position: int) -> None:
    """A header with any bytes gives a version or a UsageError, and a kernel or None."""
    image = bytearray(bzimage(gzip.compress(vmlinux())))
    image[position : position + len(data)] = data
    try:
        kernel_version(bytes(image))
    except UsageError:
        return
    extract_vmlinux(bytes(image))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compression_of_the_kernel_build_is_supported(name: str) -> None:
    """The uncompressed kernel equals the input of the kernel's build with every compression."""
    assert extract_vmlinux(bzimage(COMPRESSORS[name](vmlinux()))) == vmlinux()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_corrupt_payload_falls_back_to_the_bzimage(name: str) -> None:
    """A kernel that cannot be decompressed completely is never booted."""
    payload = bytearray(COMPRESSORS[name](vmlinux()))
    payload[8:40] = bytes(32)
    assert extract_vmlinux(bzimage(bytes(payload))) is None


@pytest.mark.parametrize(
    "image",
    [
        bzimage(gzip.compress(vmlinux(note_type=17))),
        bzimage(gzip.compress(vmlinux(name=b"GNU\0"))),
        bzimage(gzip.compress(b"not an ELF file")),
        bzimage(b"unknown format"),
        bzimage(gzip.compress(vmlinux()), protocol=0x0207),
    ],
    ids=["other note", "other owner", "no ELF", "unknown format", "old protocol"],
)
def test_a_kernel_without_pvh_entry_is_not_extracted(image: bytes) -> None:
    """QEMU refuses an ELF kernel without the PVH note, so the bzImage is used."""
    assert extract_vmlinux(image) is None
