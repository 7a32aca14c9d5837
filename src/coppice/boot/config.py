"""How a kernel was configured, and so what it has: from the kernel itself, a config file, or its
directory of modules.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import NamedTuple

from coppice.boot.modules import ModuleTree
from coppice.model import MIB

_EMBEDDED = b"IKCFG_ST"  # kernel/configs.c: the gzip of .config follows, then IKCFG_ED
_MAX_CONFIG = 4 * MIB
_LINE = re.compile(r"^CONFIG_(\w+)=([ym])$", re.MULTILINE)


class Option(NamedTuple):
    """One option of the kernel's configuration."""

    name: str  # without CONFIG_
    purpose: str
    module: str | None = None  # its name as a module; None if the option is always built in


INITRD = Option("BLK_DEV_INITRD", "the initial file system, from which the agent starts")
DEVTMPFS = Option("DEVTMPFS", "/dev")
TMPFS = Option("TMPFS", "/run and /dev/shm")
VIRTIO_MMIO = Option("VIRTIO_MMIO", "the machine's devices", "virtio_mmio")
VIRTIO_BLK = Option("VIRTIO_BLK", "the machine's disks", "virtio_blk")
EXT4 = Option("EXT4_FS", "the machine's own disk", "ext4")
OVERLAY = Option("OVERLAY_FS", "the writable root", "overlay")
EROFS = Option("EROFS_FS", "the image", "erofs")
CONSOLE = Option("VIRTIO_CONSOLE", "the connection to the agent", "virtio_console")
VSOCK = Option("VIRTIO_VSOCKETS", "the connection to the agent", "vmw_vsock_virtio_transport")
COMMAND_LINE_DEVICES = Option("VIRTIO_MMIO_CMDLINE_DEVICES", "finding the devices without ACPI")
VIRTIO_NET = Option("VIRTIO_NET", "the network card", "virtio_net")
INET = Option("INET", "the network")
KVM_GUEST = Option("KVM_GUEST", "a clock that stands still while a machine does not run")
SMP = Option("SMP", "more than one CPU")

EVERY_GUEST = (INITRD, DEVTMPFS, TMPFS, VIRTIO_MMIO, VIRTIO_BLK, EXT4, OVERLAY, EROFS)


def embedded_config(image: bytes) -> bytes | None:
    """Return the configuration that an uncompressed kernel carries (CONFIG_IKCONFIG); None if it
    carries none.
    """
    at = image.find(_EMBEDDED + b"\x1f\x8b")
    if at < 0:
        return None
    try:
        return zlib.decompressobj(wbits=31).decompress(image[at + len(_EMBEDDED) :], _MAX_CONFIG)
    except zlib.error:
        return None


def parse_config(text: str) -> dict[str, str]:
    """Return the options that are on: `y` if built in, `m` if a module. Names are without
    CONFIG_.
    """
    return dict(_LINE.findall(text))


class Configuration:
    """What is known of a kernel's options."""

    def __init__(self, options: dict[str, str] | None, modules: ModuleTree | None) -> None:
        """`options` is None if the configuration is not known, `modules` if there is no directory
        of modules.
        """
        self._options = options
        self._modules = modules

    @classmethod
    def read(cls, config: Path | None, modules: Path | None) -> Configuration:
        """Read the files of a kernel in the store. Blocks."""
        options = None if config is None else parse_config(config.read_text(errors="replace"))
        return cls(options, None if modules is None else ModuleTree(modules))

    def has(self, option: Option) -> bool | None:
        """Tell whether a guest can use an option: it is built in, or there is its module. None:
        nothing says so.
        """
        value = None if self._options is None else self._options.get(option.name, "n")
        if value == "y":
            return True
        if option.module is None or self._modules is None:
            return None if value is None else False
        return value != "n" and option.module in self._modules

    def lacking(self, options: tuple[Option, ...]) -> list[Option]:
        """Return the options that the kernel is known to lack."""
        return [option for option in options if self.has(option) is False]
