"""The initial file system of a guest: the agent as /init, its kernel modules in load order, and
files that the agent copies to /run/coppice.

It is not compressed: under emulation, decompressing costs the guest more than two megabytes cost
the host. The same inputs give the same bytes, so the file is stored by its content.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from coppice.boot.modules import ModuleFile, ModuleTree
from coppice.content.store import ContentStore
from coppice.linux.files import os_errors
from coppice.model.kernel import Kernel

REQUIRED_MODULES = ("virtio_mmio", "virtio_blk", "ext4", "overlay", "erofs")
OPTIONAL_MODULES = ("virtio_pci", "virtio_net", "virtio_rng", "af_packet")
"""Loaded if the kernel has them. A kernel without one of `REQUIRED_MODULES` cannot run a guest."""

_DIRECTORIES = ("dev", "proc", "sys", "modules", "guest", "newroot")
_ALIGN = 4


def build(
    kernel: Kernel, agent: Path, root: Path, *, guest_files: Iterable[Path] = (), agent_module: str = "virtio_console"
) -> Path:
    """Return the path of a kernel's initramfs below `root`, made if it does not exist. Blocks.

    Its mode is 0444. A kernel without a directory of modules has everything built in.

    :param guest_files: the agent copies them to /run/coppice
    :param agent_module: the driver of the device that connects the agent to the host
    :raises UsageError: the directory lacks a module that a guest needs
    """
    modules: list[ModuleFile] = []
    if kernel.modules is not None:
        tree = ModuleTree(kernel.modules)
        wanted = (*REQUIRED_MODULES, agent_module)
        modules = tree.resolve([*wanted, *(name for name in OPTIONAL_MODULES if name in tree)])
    archive = Archive()
    for name in _DIRECTORIES:
        archive.add(name, stat.S_IFDIR | 0o755)
    # The kernel opens /dev/console for init before init can mount /dev.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    with os_errors(f"read the guest agent {agent}"):
        archive.add("init", stat.S_IFREG | 0o755, agent.read_bytes())
    for path in guest_files:
        with os_errors(f"read {path}"):
            archive.add(f"guest/{path.name}", stat.S_IFREG | 0o644, path.read_bytes())
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{module.stem}.ko\n" for module in modules).encode())
    for module in modules:
        archive.add(f"modules/{module.stem}.ko", stat.S_IFREG | 0o644, module.image)
    contents = archive.finish()
    key = f"{hashlib.sha256(contents).hexdigest()[:32]}.cpio"
    with os_errors(f"write the initramfs {root / key}"):
        return ContentStore(root).make(key, lambda path: path.write_bytes(contents))


class Archive:
    """A cpio archive in the `newc` format (the kernel's
    driver-api/early-userspace/buffer-format.rst).

    Every member is root's, with time 0: the same members in the same order give the same bytes.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> None:
        """Append a member; `mode` has the type bits, `device` is the (major, minor) of a device
        node.
        """
        self._inode += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        self._parts += [header, bytes(-len(header) % _ALIGN), data, bytes(-len(data) % _ALIGN)]

    def finish(self) -> bytes:
        """Return the archive with its trailer."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)
