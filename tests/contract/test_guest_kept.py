"""A guest is never given up for a capture: an incomplete save or a failed write is found before the
VMM is ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import IntegrityError, NoSpace
from coppice.model import MIB, State, VmmProcess, VolumeMount
from coppice.requests import (
    ForkRequest,
    GetRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    SnapshotRequest,
    StandbyRequest,
)
from coppice.vmm import driver as files
from coppice.vmm.driver import Saved
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, newest_memory_of


def _gone(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink(missing_ok=True)


def _short(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(b"half")


def _nothing(_: Path) -> None:
    pass


# What a driver reports after a save, and what it has really done.
LIES: dict[str, tuple[Saved, Callable[[Path], object]]] = {
    "no memory was written": (Saved.WRITTEN, _gone(files.MEMORY_NEW)),
    "half of the memory was written": (Saved.WRITTEN, _short(files.MEMORY_NEW)),
    "no private pages over a file": (Saved.IN_PROCESS, _nothing),
    "no device state": (Saved.WRITTEN, _gone(files.VMSTATE_NEW)),
    "an empty device state": (
        Saved.WRITTEN,
        lambda directory: (directory / files.VMSTATE_NEW).write_bytes(b""),
    ),
}
CALLS = {
    "standby": lambda host: host.call(StandbyRequest(instance="oak")),
    "fork --from-running": lambda host: host.call(
        ForkRequest(instance="oak", names=["elm"], from_running=True, atomic=True)
    ),
    "snapshot": lambda host: host.call(SnapshotRequest(instance="oak")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lie", LIES)
async def test_an_incomplete_save_loses_no_guest(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, lie: str, call: str
) -> None:
    """The gap is found before the commit: the guest runs on with all that it knew, and the next
    capture is complete.
    """
    vm = await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    says, does = LIES[lie]
    save = driver.save

    async def lying(directory: Path) -> Saved:
        await save(directory)
        if says is Saved.WRITTEN:
            (directory / files.MEMORY_NEW).write_bytes(b"")
            os.truncate(directory / files.MEMORY_NEW, vm.machine.memory_bytes)
        does(directory)
        return says

    with monkeypatch.context() as patch:
        patch.setattr(driver, "save", lying)
        with pytest.raises(IntegrityError):
            await CALLS[call](fake_host)
    (oak,) = await assert_tidy(fake_host, "oak")
    assert (oak.state, oak.vmm) == (State.RUNNING, vm.vmm)
    assert await ask(fake_host, "oak", "recall", "key") == "value"
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await ask(fake_host, "oak", "recall", "key") == "value"


@pytest.mark.parametrize("private", [False, True], ids=["first boot", "private mapping"])
async def test_all_of_a_capture_is_durable_before_the_vmm_ends(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    """Memory, device state and every writable disk are synced before the VMM ends.

    A later fsync failure would have no guest to return to.
    """
    await fake_host.volumes.create("data", size_bytes=16 * MIB)
    await boot(fake_host, volumes=[VolumeMount(volume="data", mount_path="/data")])
    if private:
        await fake_host.call(StandbyRequest(instance="oak"))
        await fake_host.call(RestoreRequest(instance="oak"))
    synced: list[int] = []
    before_the_end: set[int] = set()
    fsync, end = os.fsync, driver.quit

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    async def ended(directory: Path, process: VmmProcess) -> None:
        before_the_end.update(synced)
        await end(directory, process)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(driver, "quit", ended)
    oak = (await fake_host.call(StandbyRequest(instance="oak"))).instance
    directory = fake_host.local.rooms.directory(oak.id)
    memory = newest_memory_of(fake_host, oak).name
    for name in (memory, files.VMSTATE, files.OVERLAY_DISK, files.VOLUME_DISK.format(0)):
        assert (directory / name).stat().st_ino in before_the_end, name


@pytest.mark.parametrize("private", [False, True], ids=["first boot", "private mapping"])
async def test_a_full_disk_loses_no_guest(fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    """No failing fsync loses what the guest knew. Until the VMM is ended, the guest runs on."""
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    fsync = os.fsync
    for nth in range(1, 40):
        if private and (await fake_host.call(GetRequest(instance="oak"))).mem_file is None:
            await fake_host.call(StandbyRequest(instance="oak"))
            await fake_host.call(RestoreRequest(instance="oak"))
        left = nth

        def failing(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(28, os.strerror(28))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with contextlib.suppress(NoSpace):
                await fake_host.call(StandbyRequest(instance="oak"))
        oak = await fake_host.call(GetRequest(instance="oak"))
        if oak.state is State.STANDBY:
            await fake_host.call(RestoreRequest(instance="oak"))
        assert await ask(fake_host, "oak", "recall", "key") == "value"
        if left > 0:
            break
    else:
        raise AssertionError("the standby never succeeded")
    assert nth > 3
    await assert_tidy(fake_host, "oak")


async def test_each_machine_keeps_the_driver_of_its_record(
    fake_host: AsyncHost, driver: FakeDriver, fake_vmm: Path
) -> None:
    """Machines of two drivers live in one host, each with its driver for its whole life.

    New machines get the chosen driver.
    """
    others = {"file": "anonymous", "anonymous": "file", "firecracker": "file"}[driver.personality]
    other = FakeDriver(fake_vmm, others, name="other")
    drivers = fake_host.local.rooms.drivers
    try:
        drivers.choose(other)
        elm = await boot(fake_host, "elm")
        drivers.choose(driver)
        oak = await boot(fake_host)
        assert (elm.driver, oak.driver) == ("other", "fake")
        for name in ("elm", "oak"):
            await ask(fake_host, name, "remember", "key", name)
            await fake_host.call(StandbyRequest(instance=name))
            await fake_host.call(PromoteRequest(instance=name))
            report = await fake_host.call(ForkRequest(instance=name, names=[f"{name}-fork"], atomic=True))
            (fork,) = report.instances
            assert fork.driver == (await fake_host.call(GetRequest(instance=name))).driver
            assert fork.capture is not None
            assert fork.capture.manifest.driver == fork.driver
            assert await ask(fake_host, fork, "recall", "key") == name
        assert other.faults.reached["restore"] == driver.faults.reached["restore"] == 1
        for name in ("elm-fork", "elm", "oak-fork", "oak"):
            await fake_host.call(RmRequest(instance=name))
        await assert_tidy(fake_host)
    finally:
        await other.end(fake_host.local.rooms.layout.instances)
