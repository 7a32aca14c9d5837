"""The initial file system of a guest: the agent as /init, and the kernel modules it loads, in order.

Not compressed: under emulation the guest would pay more for the decompression than the host pays for two megabytes. Built from the same
inputs it is the same file to the byte, so it is stored by its content.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from coppice.disk.atomic import os_errors, publish, temporary_beside
from coppice.guest.kernel import Kernel
from coppice.guest.modules import ModuleTree

REQUIRED_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "ext4", "overlay", "erofs")
OPTIONAL_MODULES = ("virtio_pci", "virtio_net", "virtio_rng", "squashfs", "af_packet")
"""Loaded where the kernel has them. A kernel without one of `REQUIRED_MODULES` cannot run a guest."""

_DIRECTORIES = ("dev", "proc", "sys", "modules", "newroot")
_ALIGN = 4


def build(kernel: Kernel, agent: Path, root: Path) -> Path:
    """Make the initramfs of a kernel, or find it below `root`; returns the path of the file, whose mode is 0444. Blocks.

    Raises UsageError where the kernel lacks a module that a guest needs, NoSpace or HostCannot.
    """
    tree = ModuleTree(kernel.modules)
    modules = tree.resolve([*REQUIRED_MODULES, *(name for name in OPTIONAL_MODULES if name in tree)])
    archive = Archive()
    for name in _DIRECTORIES:
        archive.add(name, stat.S_IFDIR | 0o755)
    # The kernel opens /dev/console for init before init could mount anything on /dev.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    with os_errors(f"read the guest agent {agent}"):
        archive.add("init", stat.S_IFREG | 0o755, agent.read_bytes())
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{module.stem}.ko\n" for module in modules).encode())
    for module in modules:
        archive.add(f"modules/{module.stem}.ko", stat.S_IFREG | 0o644, module.image)
    return _store(archive.finish(), root)


class Archive:
    """A cpio archive in the `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).

    Owner is root and the time is 0 for every member: the same members in the same order give the same bytes.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> None:
        """Append a member; `mode` has the type bits, `device` is the (major, minor) of a device node."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self._parts += [header, bytes(-len(header) % _ALIGN), data, bytes(-len(data) % _ALIGN)]

    def finish(self) -> bytes:
        """The archive with its trailer."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _store(contents: bytes, root: Path) -> Path:
    final = root / f"{hashlib.sha256(contents).hexdigest()[:32]}.cpio"
    with os_errors(f"write the initramfs {final}"):
        if final.exists():
            return final
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = temporary_beside(final)
        try:
            with temporary.open("xb") as file:
                file.write(contents)
                os.fchmod(file.fileno(), 0o444)
                os.fsync(file.fileno())
            publish(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return final
