"""What operations on instances work with: the data directory and the rooms that know its parts, in one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coppice.disk.overlay import OverlayStore
from coppice.guest import initramfs
from coppice.guest.client import AgentPorts
from coppice.guest.kernel import Kernel, KernelStore
from coppice.images.catalog import ImageCatalog
from coppice.store.layout import Layout
from coppice.store.store import Store
from coppice.vmm.driver import VmmDriver


@dataclass(frozen=True)
class Deadlines:
    """How long to wait for what, in seconds. Generous: an emulated guest on a loaded host is slow, not broken."""

    boot: float = 180.0
    ready: float = 90.0
    stop: float = 30.0
    lock: float = 60.0


@dataclass(frozen=True)
class Rooms:
    """One data directory, opened with one driver."""

    layout: Layout
    store: Store
    driver: VmmDriver
    images: ImageCatalog
    kernels: KernelStore
    overlays: OverlayStore
    agent: Path  # the guest agent's binary
    deadlines: Deadlines = field(default_factory=Deadlines)

    def directory(self, instance_id: str) -> Path:
        """The directory of one instance."""
        return self.layout.instance(instance_id)

    def initrd(self, kernel: Kernel) -> Path:
        """The initramfs for a kernel, built where it is not there yet. Blocks."""
        return initramfs.build(kernel, self.agent, self.layout.initramfs)

    def ports(self, instance_id: str) -> AgentPorts:
        """The agent ports of one instance."""
        return AgentPorts(self.directory(instance_id))
