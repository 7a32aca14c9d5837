"""An opened data directory: one value with all stores and drivers.

A store is made when it is first used, and its code is imported then: few operations use all of
them.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.model import Instance, Record, Snapshot
from coppice.state.layout import Layout

if TYPE_CHECKING:
    from coppice.agent.client import AgentPorts
    from coppice.agent.pool import Pool
    from coppice.boot.kernel import KernelStore
    from coppice.content.overlay import OverlayStore
    from coppice.images.catalog import ImageCatalog
    from coppice.model.kernel import Kernel
    from coppice.network import Networks
    from coppice.state.store import Store
    from coppice.vmm.driver import AgentDevice, VmmDriver
    from coppice.vmm.registry import Drivers


class Deadlines(Record, frozen=True, kw_only=True):
    """Deadlines in seconds, generous: an emulated guest on a loaded host is slow, not broken."""

    boot: float = 180.0
    ready: float = 90.0
    stop: float = 30.0
    lock: float = 60.0


class Rooms(Record, frozen=True, kw_only=True, dict=True):
    """One opened data directory."""

    layout: Layout
    store: Store
    drivers: Drivers
    networks: Networks
    agent: Path  # the guest agent's binary
    guest_files: tuple[Path, ...] = ()  # which the agent copies to /run/coppice
    deadlines: Deadlines = Deadlines()

    @cached_property
    def images(self) -> ImageCatalog:
        """The images."""
        from coppice.images.catalog import ImageCatalog

        return ImageCatalog(self.layout.images, self.store.images)

    @cached_property
    def kernels(self) -> KernelStore:
        """The kernels."""
        from coppice.boot.kernel import KernelStore

        return KernelStore(self.layout.kernels)

    @cached_property
    def overlays(self) -> OverlayStore:
        """The empty disks."""
        from coppice.content.overlay import OverlayStore

        return OverlayStore(self.layout.overlays)

    @cached_property
    def pool(self) -> Pool:
        """This process's connections to agents."""
        from coppice.agent.pool import Pool

        return Pool()

    async def disconnect(self) -> None:
        """Close this process's connections to agents."""
        if "pool" in self.__dict__:
            await self.pool.close()

    def directory(self, instance_id: str) -> Path:
        """Return the directory of an instance."""
        return self.layout.instance(instance_id)

    def initrd(self, kernel: Kernel, device: AgentDevice) -> Path:
        """Return the initramfs for a kernel and agent device, built if it is missing. Blocks."""
        from coppice.boot import initramfs  # needed only for a boot

        root = self.layout.initramfs
        return initramfs.build(kernel, self.agent, root, guest_files=self.guest_files, agent_module=device)

    def driver(self, record: Instance | Snapshot) -> VmmDriver:
        """Return the driver of an instance or snapshot.

        :raises NotSupported: this Coppice has no driver of this name
        """
        return self.drivers.named(record.driver)

    def ports(self, instance: Instance) -> AgentPorts:
        """Return the agent ports of an instance."""
        from coppice.agent.client import AgentPorts

        directory, driver = self.directory(instance.id), self.driver(instance)
        return AgentPorts(
            directory,
            partial(driver.dial, directory),
            pool=self.pool,
            vmm=instance.vmm,
            is_paused=partial(driver.is_paused, directory),
        )
