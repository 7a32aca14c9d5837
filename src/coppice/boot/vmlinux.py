"""Extract the uncompressed kernel from a bzImage.

The uncompressed kernel (ELF, with a PVH entry point) boots without decompressing itself, which
saves 0.3 s of a cold boot under emulation. QEMU maps the file instead of reading it. Firecracker
accepts no other kind. Header fields: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import bz2
import ctypes
import io
import lzma
import struct
import zlib
from collections.abc import Callable

import zstandard

from coppice.boot.bzimage import SECTOR
from coppice.boot.elf import has_pvh_entry
from coppice.model import MIB

_MAX_VMLINUX = 512 * MIB
_LZ4_BLOCK = 8 * MIB  # the legacy frame's fixed block size


def extract_vmlinux(image: bytes) -> bytes | None:
    """Return the uncompressed kernel of a bzImage, or None if only the bzImage can be used.

    That is the case if the kernel has no PVH entry point, or this host cannot decompress it (LZ4
    needs liblz4, which apt depends on). The last four bytes of the payload are the uncompressed
    size: gzip's own trailer, or one that the kernel's build appends. They detect a truncated
    payload.
    """
    protocol, setup_sectors = struct.unpack_from("<H", image, 0x206)[0], image[0x1F1] or 4
    if protocol < 0x0208:  # version 2.08 added the payload fields
        return None
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * SECTOR + offset
    payload = image[start : start + length]
    for magic, decompress in _FORMATS:
        if payload.startswith(magic):
            try:
                vmlinux = decompress(payload)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError, struct.error):
                return None
            return vmlinux if payload.endswith(struct.pack("<I", len(vmlinux))) and has_pvh_entry(vmlinux) else None
    return None


def _gzip(payload: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload, _MAX_VMLINUX)


def _xz(payload: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(payload, _MAX_VMLINUX)


def _bzip2(payload: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload, _MAX_VMLINUX)


def _zstd(payload: bytes) -> bytes:
    # The kernel's build uses `zstd -22 --ultra`, with a window of 128 MiB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=128 * MIB)
    with decompressor.stream_reader(io.BytesIO(payload)) as stream:
        return stream.read(_MAX_VMLINUX)


def _lz4_legacy(payload: bytes) -> bytes:
    """Decompress blocks of `length: u32 | data`, 8 MiB each. The kernel's build appends the total
    as u32.
    """
    library = ctypes.CDLL("liblz4.so.1")
    unfold = library.LZ4_decompress_safe
    unfold.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    unfold.restype = ctypes.c_int
    block = ctypes.create_string_buffer(_LZ4_BLOCK)
    plain = bytearray()
    position, end = 4, len(payload) - 4
    while position < end and len(plain) < _MAX_VMLINUX:
        (length,) = struct.unpack_from("<I", payload, position)
        data = payload[position + 4 : position + 4 + length]
        written = unfold(data, block, len(data), _LZ4_BLOCK)
        if written < 0 or len(data) != length:
            raise ValueError("an LZ4 block is corrupt")
        plain += memoryview(block)[:written]
        position += 4 + length
    return bytes(plain)


_FORMATS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (b"\x5d\0\0", _xz),
    (b"BZh", _bzip2),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x02\x21\x4c\x18", _lz4_legacy),
)
