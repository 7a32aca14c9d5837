"""Drivers by name: an existing machine has the driver of its record, and a new one the chosen
driver.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import NotSupported, UsageError
from coppice.vmm.qemu.driver import QemuDriver
from coppice.vmm.registry import Drivers
from fakes.driver import FakeDriver


def test_qemu_is_the_default() -> None:
    """QEMU makes new machines unless another driver is chosen."""
    drivers = Drivers()
    assert isinstance(drivers.chosen, QemuDriver)
    assert drivers.named("qemu") is drivers.chosen


def test_a_given_driver_is_registered_and_chosen(tmp_path: Path) -> None:
    """Existing machines keep the drivers of their records."""
    fake = FakeDriver(tmp_path)
    drivers = Drivers(fake)
    assert drivers.chosen is drivers.named("fake") is fake
    assert isinstance(drivers.named("qemu"), QemuDriver)
    assert {driver.name for driver in drivers} == {"fake", "firecracker", "qemu"}


def test_an_unknown_vmm_is_refused(tmp_path: Path) -> None:
    """An unknown name from the user is a usage error that lists the choices; one in a record is not
    supported.
    """
    with pytest.raises(UsageError, match="there is no VMM 'vmware'") as refused:
        AsyncHost(tmp_path, vmm="vmware")
    assert "qemu" in (refused.value.hint or "")
    with pytest.raises(NotSupported, match="'firefly'"):
        Drivers().named("firefly")
