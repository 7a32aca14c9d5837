"""The fake driver keeps the contract of every driver: what is tested with it holds for the real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.disk.overlay import OverlayStore
from coppice.images.catalog import ImageCatalog
from coppice.store.layout import Layout
from coppice.vmm.driver import VmmDriver
from driver_contract import Bench, DriverContract
from fakes.driver import FakeDriver
from fakes.records import MACHINE
from fakes.rooms import IMAGE


class TestFakeDriver(DriverContract):
    """All of the contract, with the fake."""

    @pytest.fixture
    async def bench(self, fake_vmm: Path, fake_home: Path) -> AsyncIterator[Bench]:
        """Fake machines in a data directory without a host."""
        layout = Layout(fake_home)
        images = ImageCatalog(layout.images)
        made: list[FakeDriver] = []

        def make_driver() -> VmmDriver:
            made.append(FakeDriver(fake_vmm))
            return made[-1]

        yield Bench(
            make_driver=make_driver,
            instances=layout.instances,
            machine=MACHINE,
            root=images.root_file(images.get(IMAGE)),
            kernel=layout.kernels / "vmlinuz",
            initrd=layout.kernels / "initrd",
            stub=(layout.kernels / "stub.kernel", layout.kernels / "stub.initrd"),
            overlays=OverlayStore(layout.overlays),
            patience_s=10.0,
        )
        for driver in made:
            await driver.end(layout.instances)
