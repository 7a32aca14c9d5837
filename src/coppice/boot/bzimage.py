"""The header of a bzImage, with its version. (`vmlinux` has the decompression, which forks do not
need.)

Header fields: Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import struct

from coppice.errors import UsageError

STUB_BYTES = 64 << 10
"""So much of a bzImage is enough for a VMM that only restores: it checks the header, and never runs
the rest.
"""

SECTOR = 512
_PROTOCOL = 0x020F
_SETUP_SECTORS = 4
_HINT = "give a bzImage, such as arch/x86/boot/bzImage of a built kernel, or /boot/vmlinuz-VERSION"


def kernel_version(image: bytes) -> str:
    """Return the release (`uname -r`) in the header of a bzImage.

    :raises UsageError: the image is not a bzImage
    """
    if len(image) < STUB_BYTES or image[0x202:0x206] != b"HdrS":
        raise UsageError("the kernel is not a bzImage", hint=_HINT)
    start = struct.unpack_from("<H", image, 0x20E)[0] + SECTOR
    text = image[start : start + 256].partition(b"\0")[0]
    release = text.partition(b" ")[0].decode("ascii", "replace")
    if not release or not all(letter.isalnum() or letter in "._+~-" for letter in release):
        raise UsageError("the bzImage has no version", hint=_HINT)
    return release


def stub() -> bytes:
    """Return a header without a kernel, for a VMM that only restores the machine of an uncompressed
    kernel.
    """
    image = bytearray(STUB_BYTES)
    image[0x1F1] = _SETUP_SECTORS
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, _PROTOCOL)
    image[0x211] = 1  # LOADED_HIGH
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)  # the highest address of an initrd
    return bytes(image)
