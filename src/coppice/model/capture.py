"""Captures: the memory of a machine at one instant, and the facts that a restore needs."""

from enum import StrEnum
from typing import Self

import msgspec

from coppice.model.record import Record


class Sharing(StrEnum):
    """How an instance got the mem-file that it maps."""

    OWN = "own"  # made by the instance: by its first boot, or its own capture
    HARDLINK = "hardlink"  # a link to the source's inode
    COPY = "copy"  # the file system or the driver could not link


class MemFile(Record, frozen=True, kw_only=True):
    """The state of a mem-file when it was frozen or linked. It is compared before each restore."""

    inode: int
    device: int
    size_bytes: int
    sharing: Sharing
    reason: str = ""  # why it is a copy; empty if it is not
    sha256: str | None = None


class MemLayer(MemFile, frozen=True, kw_only=True):
    """The state of one layer over a base mem-file when it was frozen or linked.

    `size_bytes` is the size of the file: a header, the pages and the map.
    """

    data_bytes: int  # guest memory that it replaces
    extents: int  # of its map, which covers the layers below it too
    map_sha256: str  # of the map, which is checked before each restore


class Manifest(Record, frozen=True, kw_only=True):
    """The host and VMM that a vmstate can be restored on. Elsewhere the guest crashes or hangs."""

    driver: str
    vmm_version: str
    machine: str
    accel: str
    cpu_model: str
    cpu_flags: str  # digest of the host's CPU flags if the guest sees them, else ""
    kernel: str
    memory_bytes: int
    cpus: int
    tsc_khz: int = 0  # the frequency of the guest's clock source; 0 if the VMM scales it


class Capture(Record, frozen=True, kw_only=True):
    """The memory of a machine at one instant. It is copied as a whole: to a fork, to a snapshot,
    and back.

    The memory is `mem_file` with `layers` over it, lowest first. Holders of the same capture differ
    only in `mem_file`, `layers` and `disk_stamp`, since each has its own files.

    A running machine keeps the capture that it was restored from: its mem-file is the base of its
    private pages. If a mapping was made private while its machine ran, the capture has an empty
    `disk_stamp`: without device state it can be a base, but cannot be restored.
    """

    mem_file: MemFile
    layers: tuple[MemLayer, ...] = ()
    manifest: Manifest  # the host and VMM that can load the device state
    captured_at: float
    disk_stamp: str = ""  # of the disks at that instant, without which the memory is useless
    open_ports: tuple[int, ...] = ()  # agent ports that had a session at that instant: half open after a restore
    frozen: bool = False  # the guest's file system was frozen, and must be thawed after a restore
    identity_serial: int = 0  # of the latest identity message in this memory; the next one must be larger
    vmstate_sha256: str | None = None  # of the device state
    shared_random: tuple[str, ...] = ()  # processes whose random generators its forks share: "node (pid 212): openssl"
    printed: str = ""  # of the text of its check by a line of the console: all that was shown, or its beginning

    @property
    def memory(self) -> tuple[MemFile, ...]:
        """All files of the memory: the base, and its layers."""
        return (self.mem_file, *self.layers)

    @property
    def inodes(self) -> tuple[int, ...]:
        """The inodes of all files of the memory: two captures with the same have the same memory."""
        return tuple(file.inode for file in self.memory)

    @property
    def copied(self) -> MemFile | None:
        """The first file of the memory that is a copy and not a link; None if there is none."""
        return next((file for file in self.memory if file.sharing is Sharing.COPY), None)

    def with_sha256(self, inode: int, digest: str) -> Self | None:
        """Return the capture with the digest of one of its files; None if none with that inode lacks one."""
        if self.mem_file.inode == inode and self.mem_file.sha256 is None:
            return msgspec.structs.replace(self, mem_file=msgspec.structs.replace(self.mem_file, sha256=digest))
        layers = tuple(
            msgspec.structs.replace(layer, sha256=digest) if layer.inode == inode and layer.sha256 is None else layer
            for layer in self.layers
        )
        return msgspec.structs.replace(self, layers=layers) if layers != self.layers else None
