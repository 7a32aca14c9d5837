"""The fake driver keeps the contract of every driver, so tests with it hold for the real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.content.overlay import OverlayStore
from coppice.model.network import Nic, NicBackend
from coppice.state.layout import Layout
from coppice.vmm.driver import VmmDriver
from driver_bench import Bench
from driver_contract import DriverContract
from fakes.driver import FakeDriver
from fakes.records import MACHINE
from fakes.rooms import IMAGE
from image_archives import open_catalog

NIC = Nic(backend=NicBackend.USER_MODE, mac="02:00:00:00:00:01")


class TestFakeDriver(DriverContract):
    """The whole contract, checked with the fake driver."""

    @pytest.fixture(params=[(NIC,), ()], ids=["user", "none"])
    async def bench(self, fake_vmm: Path, fake_home: Path, request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
        """Fake machines in a data directory without a host."""
        layout = Layout(fake_home)
        images = open_catalog(fake_home)
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
            nics=request.param,
        )
        for driver in made:
            await driver.end(layout.instances)
