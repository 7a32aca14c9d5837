"""A bzImage: its version, and the uncompressed kernel inside of it.

The uncompressed kernel (ELF, with a PVH entry point) boots without decompressing itself, which saves 0.3 s of a cold boot under
emulation, and QEMU maps the file instead of reading it. Firecracker takes nothing else. Header fields: Documentation/arch/x86/boot.rst.
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

from coppice.errors import UsageError
from coppice.model import MIB

STUB_BYTES = 64 << 10
"""So much of a bzImage is enough for a VMM that only restores: it checks the header, and never runs the rest."""

_MAX_VMLINUX = 512 * MIB
_LZ4_BLOCK = 8 * MIB  # the legacy frame's fixed block size
_SECTOR = 512
_PT_NOTE = 4
_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry point
_HINT = "give a bzImage, such as arch/x86/boot/bzImage of a built kernel, or /boot/vmlinuz-VERSION"


def kernel_version(image: bytes) -> str:
    """The release (`uname -r`) that a bzImage says of itself. Raises UsageError where it is no bzImage."""
    if len(image) < STUB_BYTES or image[0x202:0x206] != b"HdrS":
        raise UsageError("the kernel is no bzImage", hint=_HINT)
    start = struct.unpack_from("<H", image, 0x20E)[0] + _SECTOR
    text = image[start : start + 256].partition(b"\0")[0]
    release = text.partition(b" ")[0].decode("ascii", "replace")
    if not release or not all(letter.isalnum() or letter in "._+~-" for letter in release):
        raise UsageError("the bzImage does not say its version", hint=_HINT)
    return release


def extract_vmlinux(image: bytes) -> bytes | None:
    """The uncompressed kernel of a bzImage, if it can be entered directly; else None, and the bzImage must do.

    None also where this host cannot decompress it: LZ4 needs liblz4, which every Debian has for apt. The last four bytes of the payload are
    the size of what it unfolds to (gzip's own trailer; the kernel's build appends it to the other formats): so a truncated one is not taken.
    """
    protocol, setup_sectors = struct.unpack_from("<H", image, 0x206)[0], image[0x1F1] or 4
    if protocol < 0x0208:  # the payload fields came with 2.08
        return None
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * _SECTOR + offset
    payload = image[start : start + length]
    for magic, decompress in _FORMATS:
        if payload.startswith(magic):
            try:
                vmlinux = decompress(payload)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError, struct.error):
                return None
            return vmlinux if payload.endswith(struct.pack("<I", len(vmlinux))) and _has_pvh_entry(vmlinux) else None
    return None


def _gzip(payload: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload, _MAX_VMLINUX)


def _xz(payload: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(payload, _MAX_VMLINUX)


def _bzip2(payload: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload, _MAX_VMLINUX)


def _zstd(payload: bytes) -> bytes:
    # ZSTD -22 --ultra, as the kernel's build uses it, has a window of 128 MiB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=128 * MIB)
    with decompressor.stream_reader(io.BytesIO(payload)) as stream:
        return stream.read(_MAX_VMLINUX)


def _lz4_legacy(payload: bytes) -> bytes:
    """Blocks of `length: u32 | data`, 8 MiB each when unfolded; the kernel's build appends the total as a last u32."""
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


def _has_pvh_entry(elf: bytes) -> bool:
    """Whether an ELF file carries the note that names its PVH entry point; without it QEMU refuses the file."""
    try:
        if not elf.startswith(b"\x7fELF\x02\x01"):
            return False
        (table,) = struct.unpack_from("<Q", elf, 0x20)
        size, count = struct.unpack_from("<HH", elf, 0x36)
        for index in range(count):
            kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", elf, table + index * size)
            if kind == _PT_NOTE and _has_note(elf[offset : offset + length]):
                return True
    except struct.error:
        return False
    return False


def _has_note(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_bytes, data_bytes, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_bytes]
        if name == b"Xen\0" and kind == _PHYS32_ENTRY:
            return True
        position += 12 + -(-name_bytes // 4) * 4 + -(-data_bytes // 4) * 4
    return False
