"""An uncompressed kernel, the ELF file `vmlinux`: its version and its entry points.

Firecracker enters the file at its 64-bit entry point. QEMU enters it at the PVH entry point, which
an ELF note names.
"""

from __future__ import annotations

import re
import struct

from coppice.errors import UsageError

MAGIC = b"\x7fELF"
_X86_64 = MAGIC + b"\x02\x01"  # 64-bit, little-endian
_MACHINE_X86_64 = 62
_PT_NOTE = 4
_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry point
# linux_banner (init/version.c): "Linux version RELEASE (builder@host) (compiler) #1 ...". A format
# with %s is elsewhere in the file.
_BANNER = re.compile(rb"Linux version ([A-Za-z0-9._+~-]+) \(")
_HINT = "give the file vmlinux of a kernel that was built for x86-64"


def vmlinux_version(image: bytes) -> str:
    """Return the release (`uname -r`) that an uncompressed kernel says of itself.

    :raises UsageError: the file is not an x86-64 ELF file, or has no version
    """
    if not image.startswith(_X86_64) or len(image) < 64 or struct.unpack_from("<H", image, 18)[0] != _MACHINE_X86_64:
        raise UsageError("the kernel is not an ELF file for x86-64", hint=_HINT)
    if (found := _BANNER.search(image)) is None:
        raise UsageError("the ELF file is not a Linux kernel: it has no version", hint=_HINT)
    return found[1].decode()


def has_pvh_entry(elf: bytes) -> bool:
    """Tell whether an ELF file has the note that names its PVH entry point; QEMU refuses a file
    without it.
    """
    try:
        if not elf.startswith(_X86_64):
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
