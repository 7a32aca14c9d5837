"""The QEMU driver keeps the fake driver's contract, so tests with the fake hold for it too."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.model import MIB, MachineSpec
from coppice.model.network import Nic, NicBackend
from coppice.vmm.qemu.driver import QemuDriver
from driver_bench import Bench
from driver_contract import DriverContract
from platforms import Platform


class TestQemuDriver(DriverContract):
    """The whole contract, checked with real machines."""

    @pytest.fixture
    async def bench(self, host: AsyncHost, platform: Platform, image: str, tmp_path: Path) -> AsyncIterator[Bench]:
        """Real machines in a directory without a host, on the data directory's file system."""
        kernel = await host.kernels.fetch()
        driver = QemuDriver(platform.accel)
        instances = host.home / "contract" / tmp_path.name
        instances.mkdir(parents=True)
        yield Bench(
            make_driver=lambda: QemuDriver(platform.accel),
            instances=instances,
            machine=MachineSpec(memory_bytes=128 * MIB, overlay_bytes=64 * MIB, kernel=kernel.key, acpi=kernel.acpi),
            root=host.local.rooms.images.root_file(await host.images.inspect(image)),
            kernel=kernel.boot_image,
            initrd=host.local.rooms.initrd(kernel, driver.capabilities.agent_device),
            stub=host.local.rooms.kernels.stub(kernel.key),
            overlays=host.local.rooms.overlays,
            patience_s=60.0,
            nics=(Nic(backend=NicBackend.USER_MODE, mac="02:00:00:00:00:01"),),
        )
        for directory, processes in driver.find_orphans(instances).items():
            for process in processes:
                await driver.quit(directory, process)
        shutil.rmtree(instances)
