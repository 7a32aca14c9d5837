"""Makers of small files that look like a kernel, its modules, and its package tools."""

from __future__ import annotations

import struct
from pathlib import Path

RELEASE = "6.1.0-9-cloud-amd64"
_SETUP_SECTORS = 3
_PAYLOAD_OFFSET = 64


def bzimage(payload: bytes = b"", *, release: str = RELEASE, protocol: int = 0x020F) -> bytes:
    """Return a bzImage: a valid setup header, the version string, and `payload` as the compressed
    kernel.
    """
    image = bytearray(128 << 10)
    image[0x1F1] = _SETUP_SECTORS
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<HHI", image, 0x206, protocol, 0, 0)
    text = f"{release} (builder@host) #1 SMP\0".encode()
    struct.pack_into("<H", image, 0x20E, 0x400 - 0x200)
    image[0x400 : 0x400 + len(text)] = text
    struct.pack_into("<II", image, 0x248, _PAYLOAD_OFFSET, len(payload))
    start = (_SETUP_SECTORS + 1) * 512 + _PAYLOAD_OFFSET
    image[start : start + len(payload)] = payload
    return bytes(image)


def vmlinux(*, note_type: int = 18, name: bytes = b"Xen\0") -> bytes:
    """Return an ELF file with one note segment: another note, then by default that of a PVH entry
    point.
    """
    other = struct.pack("<III", 4, 6, 6) + b"Xen\0" + b"linux\0\0\0"
    notes = other + struct.pack("<III", len(name), 4, note_type) + name + bytes(4)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x20, 64)
    struct.pack_into("<HH", header, 0x36, 56, 1)
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(notes), len(notes), 4)
    return bytes(header) + segment + notes + b"\xcc" * 4096


def module(name: str, depends: str = "", *, release: str = RELEASE, softdep: str = "") -> bytes:
    """Return the ELF image of a module with a `.modinfo` section."""
    soft = (f"softdep={softdep}",) if softdep else ()
    pairs = (*soft, f"depends={depends}", "retpoline=Y", f"name={name}", f"vermagic={release} SMP preempt mod_unload ")
    modinfo = b"".join(pair.encode() + b"\0" for pair in pairs)
    names = b"\0.shstrtab\0.modinfo\0"
    body = names + modinfo
    sections = [
        bytes(64),
        struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 64, len(names), 0, 0, 1, 0),
        struct.pack("<IIQQQQIIQQ", names.index(b".modinfo"), 1, 0, 0, 64 + len(names), len(modinfo), 0, 0, 1, 0),
    ]
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, 64 + len(body))
    struct.pack_into("<HHH", header, 0x3A, 64, len(sections), 1)
    return bytes(header) + body + b"".join(sections)


MODULES = {
    "drivers/virtio/virtio": "virtio_ring",
    "drivers/virtio/virtio_ring": "",
    "drivers/virtio/virtio_mmio": "virtio,virtio_ring",
    "drivers/block/virtio_blk": "virtio,virtio_ring",
    "drivers/char/virtio_console": "virtio,virtio_ring",
    "drivers/char/hw_random/virtio-rng": "virtio",
    "drivers/sound/unwanted": "virtio",
    "fs/overlayfs/overlay": "",
    "fs/erofs/erofs": "libcrc32c",
    "lib/libcrc32c": "",
}


def module_tree(directory: Path, *, release: str = RELEASE) -> Path:
    """Make a `lib/modules/VERSION` directory with a guest's modules, ext4 built in, and the usual
    links out of it.
    """
    for path, depends in MODULES.items():
        file = directory / "kernel" / f"{path}.ko"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(module(file.stem, depends, release=release))
    (directory / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/crypto/crc32c_generic.ko\n")
    (directory / "modules.order").write_text("".join(f"kernel/{path}.ko\n" for path in MODULES))
    (directory / "build").symlink_to("/usr/src/somewhere")
    return directory
