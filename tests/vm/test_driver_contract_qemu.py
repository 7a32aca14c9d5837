"""The QEMU driver keeps the contract that the fake keeps: what is proved over the fake holds for real machines."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.host import AsyncHost
from coppice.model import MIB, MachineSpec
from coppice.vmm.qemu.driver import QemuDriver
from driver_contract import Bench, DriverContract


class TestQemuDriver(DriverContract):
    """All of the contract, with real machines."""

    @pytest.fixture
    async def bench(self, host: AsyncHost, image: str, tmp_path: Path) -> AsyncIterator[Bench]:
        """Real machines in a directory without a host; it is on the data directory's file system."""
        kernel = await host.kernel_fetch()
        instances = host.home / "contract" / tmp_path.name
        instances.mkdir(parents=True)
        yield Bench(
            make_driver=QemuDriver,
            instances=instances,
            machine=MachineSpec(memory_bytes=128 * MIB, overlay_bytes=64 * MIB, kernel=kernel.key),
            root=host.rooms.images.root_file(await host.image_inspect(image)),
            kernel=kernel.boot_image,
            initrd=host.rooms.initrd(kernel),
            stub=host.rooms.kernels.stub(kernel),
            overlays=host.rooms.overlays,
            patience_s=60.0,
        )
        driver = QemuDriver()
        for directory, processes in driver.find_orphans(instances).items():
            for process in processes:
                await driver.quit(directory, process)
        shutil.rmtree(instances)
