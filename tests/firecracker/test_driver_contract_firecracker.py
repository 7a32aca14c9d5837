"""The Firecracker driver keeps the same contract as the fake driver, so tests with the fake hold
for real microVMs.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.model import MIB, MachineSpec
from coppice.model.kernel import Kernel
from coppice.vmm.firecracker.driver import FirecrackerDriver
from driver_bench import Bench
from driver_contract import DriverContract


class TestFirecrackerDriver(DriverContract):
    """The whole contract, checked with real machines."""

    @pytest.fixture
    async def bench(self, host: AsyncHost, image: str, kernel: Kernel, tmp_path: Path) -> AsyncIterator[Bench]:
        """Real machines in a directory without a host, on the data directory's file system."""
        rooms = host.local.rooms
        instances = host.home / "contract" / tmp_path.name
        instances.mkdir(parents=True)
        driver = FirecrackerDriver()
        yield Bench(
            make_driver=FirecrackerDriver,
            instances=instances,
            machine=MachineSpec(memory_bytes=128 * MIB, overlay_bytes=64 * MIB, kernel=kernel.key, network="none"),
            root=rooms.images.root_file(await host.images.inspect(image)),
            kernel=kernel.boot_image,
            initrd=rooms.initrd(kernel, driver.capabilities.agent_device),
            stub=rooms.kernels.stub(kernel.key),
            overlays=rooms.overlays,
            patience_s=30.0,
        )
        for directory, processes in driver.find_orphans(instances).items():
            for process in processes:
                await driver.quit(directory, process)
        shutil.rmtree(instances)
