"""What can go wrong between two lines: a commit that is cancelled, an error of the operating system, a file that is gone, a guest that means harm."""

from __future__ import annotations

import asyncio
import os

import pytest

from coppice.errors import VmmTimeout
from coppice.host import AsyncHost
from coppice.instance import capture
from coppice.memory.capture import PrivateCapture
from coppice.model import Instance, State
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, make

# Captures


async def test_a_commit_that_is_cancelled_is_a_commit(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest does not run for one instant after it: a host that then died would take a capture for whole whose disk has moved on."""
    await boot(fake_host)
    store, loop = fake_host.rooms.store, asyncio.get_running_loop()
    begin = store.begin

    def cancelled_commit(instance: Instance, operation: str) -> None:
        begin(instance, operation)
        if operation == capture.COMMITTED:
            loop.call_soon_threadsafe(task.cancel)

    monkeypatch.setattr(store, "begin", cancelled_commit)
    task = asyncio.create_task(fake_host.standby("oak"))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert driver.faults.reached["resume"] == 0
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY


async def test_the_disk_is_not_frozen_while_memory_is_cloned(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone without reflinks takes its time, and a guest thaws by itself: frozen first, it would be captured with a dirty disk."""
    oak = await make(fake_host, State.STANDBY)
    await fake_host.restore("oak")
    frozen: list[bool] = []
    prepare = PrivateCapture.prepare

    def looked_at(self: PrivateCapture) -> None:
        frozen.append(driver.guest_state(fake_host.rooms.directory(oak.id)).frozen)
        prepare(self)

    monkeypatch.setattr(PrivateCapture, "prepare", looked_at)
    oak, _ = await fake_host.standby("oak")
    assert frozen == [False]
    assert oak.frozen


async def test_the_disk_of_a_capture_survives_a_power_cut(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mem-file is synced; without the disk of the same instant it would be restored onto a file system that it does not know."""
    oak = await boot(fake_host)
    synced: set[int] = set()
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    await fake_host.standby("oak")
    directory = fake_host.rooms.directory(oak.id)
    for name in (files.MEMORY, files.VMSTATE, files.OVERLAY_DISK):
        assert (directory / name).stat().st_ino in synced


async def test_a_guest_that_cannot_be_resumed_is_said_to_be_paused(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """It is not called Running while its CPUs stand still; capturing and restoring it lets it run on."""
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    driver.faults.fail_at("save_devices")
    driver.faults.fail_at("resume", error=lambda: VmmTimeout("it does not answer", hint="wait"))
    with pytest.raises(Exception, match="save_devices is planned to fail"):
        await fake_host.standby("oak")
    assert (await fake_host.get("oak")).state is State.PAUSED
    await fake_host.standby("oak")
    await fake_host.restore("oak")
    assert await ask(fake_host, "oak", "recall", "key") == "value"
