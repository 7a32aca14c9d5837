"""The fake VMM obeys orders one after the other, as the monitor of a real VMM does, even if a killed
host sent some of them.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from fakes.driver import FakeDriver
from fakes.hosting import ask, boot
from fakes.rooms import DEADLINES, open_rooms, plant


@pytest.mark.parametrize("personality", ["file", "anonymous"])
@pytest.mark.parametrize("unfinished", [signal.SIGHUP, signal.SIGUSR1])
async def test_a_resume_takes_effect_after_the_unfinished_order_of_a_killed_host(
    fake_vmm: Path, seed_home: Path, personality: str, unfinished: int
) -> None:
    """The guest answers again: neither a save nor a pause overtakes the resume."""
    home = Path(tempfile.mkdtemp(prefix="orders-", dir=seed_home.parent)) / "home"
    plant(seed_home, home)
    driver = FakeDriver(fake_vmm, personality)
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms) as host:
        vm = await boot(host)
        assert vm.vmm is not None
        directory = host.local.rooms.directory(vm.id)
        for _ in range(20):
            await driver.pause(directory)
            os.kill(vm.vmm.pid, unfinished)  # the sender is killed before it sees the effect
            await driver.resume(directory)
            assert not await driver.is_paused(directory)
            assert await ask(host, vm, "hostname") == vm.hostname
    await driver.end(home / "instances")
