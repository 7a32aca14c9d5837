"""A failure at any step of any operation gives a clear error and restores the state before."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coppice.client import AsyncHost
from coppice.errors import (
    CoppiceError,
    GuestRefused,
    GuestTimeout,
    IntegrityError,
    NoSpace,
    UsageError,
    VmmDied,
    VmmError,
)
from coppice.machine import directory
from coppice.machine.rooms import Deadlines
from coppice.model import State
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    GetRequest,
    LsRequest,
    RestoreRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.vmm import driver as files
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, fingerprint, make, memory_of
from fakes.rooms import DEADLINES, open_rooms

Plan = Callable[[FakeDriver], None]

# Faults on the way to Running, and the error that each must raise.
BOOT_FAULTS: dict[str, tuple[Plan, type[CoppiceError]]] = {
    "no manifest": (lambda driver: driver.faults.fail_at("manifest"), VmmError),
    "no start": (lambda driver: driver.faults.fail_at("boot"), VmmError),
    "an error after the start": (lambda driver: driver.faults.fail_at("booted"), VmmError),
    "death after the start": (lambda driver: driver.faults.die_at("booted"), VmmDied),
    "death at the identity": (lambda driver: driver.faults.die_at("identity"), VmmDied),
    "a refused identity": (lambda driver: driver.faults.fail_at("identity"), GuestRefused),
}
RESTORE_FAULTS: dict[str, tuple[Plan, type[CoppiceError]]] = {
    "no manifest": (lambda driver: driver.faults.fail_at("manifest"), VmmError),
    "no start": (lambda driver: driver.faults.fail_at("restore"), VmmError),
    "an error after the start": (lambda driver: driver.faults.fail_at("restored"), VmmError),
    "death after the start": (lambda driver: driver.faults.die_at("restored"), VmmDied),
    "death at the identity": (lambda driver: driver.faults.die_at("identity"), VmmDied),
    "a refused identity": (lambda driver: driver.faults.fail_at("identity"), GuestRefused),
    "another VMM": (lambda driver: setattr(driver, "vmm_version", "2"), IntegrityError),
}
CAPTURE_FAULTS: dict[str, tuple[Plan, type[CoppiceError], State]] = {
    "no pause": (lambda driver: driver.faults.fail_at("pause"), VmmError, State.RUNNING),
    "no devices": (lambda driver: driver.faults.fail_at("save"), VmmError, State.RUNNING),
    "no answer to the save": (lambda driver: driver.faults.fail_at("saved"), VmmError, State.RUNNING),
    "death at the pause": (lambda driver: driver.faults.die_at("pause"), VmmDied, State.STOPPED),
    "death at the devices": (lambda driver: driver.faults.die_at("save"), VmmDied, State.STOPPED),
}


@pytest.mark.parametrize("fault", BOOT_FAULTS)
async def test_a_run_that_fails_leaves_nothing(fake_host: AsyncHost, driver: FakeDriver, fault: str) -> None:
    """No record, directory, lock, row or process is left, and the name is free again."""
    plan, error = BOOT_FAULTS[fault]
    plan(driver)
    with pytest.raises(error) as failure:
        await boot(fake_host)
    assert failure.value.hint
    await assert_tidy(fake_host)
    await boot(fake_host)
    await assert_tidy(fake_host, "oak")


async def test_a_vmm_that_dies_at_the_start_is_explained(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """The error has the VMM's exit and the console's last line.

    The hint names the logs, if the machine was not removed with them.
    """
    why = re.escape("ended before it answered: signal 9; its console ended with 'the fake guest boots'")
    driver.faults.die_at("identity")
    with pytest.raises(VmmDied, match=why) as of_a_new_one:
        await boot(fake_host)
    await boot(fake_host, start=False)
    driver.faults.die_at("identity")
    with pytest.raises(VmmDied, match=why) as of_an_old_one:
        await fake_host.call(StartRequest(instance="oak"))
    assert "--no-start" in (of_a_new_one.value.hint or "")
    assert "`coppice logs oak`" in (of_an_old_one.value.hint or "")


@pytest.mark.parametrize("fault", BOOT_FAULTS)
async def test_a_start_that_fails_leaves_it_stopped(fake_host: AsyncHost, driver: FakeDriver, fault: str) -> None:
    """The record has the reason, the disk is whole, and the machine can be started again."""
    await boot(fake_host)
    await ask(fake_host, "oak", "save", "kept")
    await fake_host.call(StopRequest(instance="oak"))
    plan, error = BOOT_FAULTS[fault]
    plan(driver)
    with pytest.raises(error):
        await fake_host.call(StartRequest(instance="oak"))
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STOPPED
    assert (oak.exit_reason or "").startswith("start failed: ")
    await fake_host.call(StartRequest(instance="oak"))
    assert await ask(fake_host, "oak", "load") == "kept"
    assert (await fake_host.call(GetRequest(instance="oak"))).exit_reason is None


@pytest.mark.parametrize("fault", RESTORE_FAULTS)
async def test_a_restore_that_fails_leaves_it_in_standby(fake_host: AsyncHost, driver: FakeDriver, fault: str) -> None:
    """The mem-file is unchanged, and a second restore finds all that the guest knew."""
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    before = (await fake_host.call(StandbyRequest(instance="oak"))).instance
    captured = fingerprint(memory_of(fake_host, before))
    plan, error = RESTORE_FAULTS[fault]
    plan(driver)
    with pytest.raises(error):
        await fake_host.call(RestoreRequest(instance="oak"))
    driver.vmm_version = "1"
    (oak,) = await assert_tidy(fake_host, "oak")
    assert oak.state is State.STANDBY
    assert fingerprint(memory_of(fake_host, oak)) == captured
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await ask(fake_host, "oak", "recall", "key") == "value"


@pytest.mark.parametrize("fault", RESTORE_FAULTS)
async def test_a_fork_that_fails_leaves_nothing(fake_host: AsyncHost, driver: FakeDriver, fault: str) -> None:
    """The result says why, and the source has the same links and forks as before."""
    source = await make(fake_host, State.TEMPLATE)
    plan, error = RESTORE_FAULTS[fault]
    plan(driver)
    (result,) = (await fake_host.call(ForkRequest(instance="oak", names=["elm"]))).results
    assert (result.ok, result.error_code, result.instance) == (False, error.code, None)
    await assert_tidy(fake_host, "oak")
    assert memory_of(fake_host, source).stat().st_nlink == 1
    driver.vmm_version = "1"
    assert (await fake_host.call(ForkRequest(instance="oak", names=["elm"]))).succeeded == 1


@pytest.mark.parametrize("private", [False, True], ids=["first boot", "private mapping"])
@pytest.mark.parametrize("fault", CAPTURE_FAULTS)
async def test_a_capture_that_fails_lets_the_guest_run_on(
    fake_host: AsyncHost, driver: FakeDriver, fault: str, private: bool
) -> None:
    """The guest runs as before.

    If the VMM itself died, the machine is Stopped with the reason, and no partial capture is left.
    """
    await boot(fake_host)
    await ask(fake_host, "oak", "save", "on disk")
    if private:
        await fake_host.call(StandbyRequest(instance="oak"))
        await fake_host.call(RestoreRequest(instance="oak"))
        await ask(fake_host, "oak", "save", "later")  # now the older capture and the disk are of different instants
    plan, error, outcome = CAPTURE_FAULTS[fault]
    plan(driver)
    with pytest.raises(error):
        await fake_host.call(StandbyRequest(instance="oak"))
    oak = await fake_host.call(GetRequest(instance="oak"))
    assert oak.state is outcome
    await assert_tidy(fake_host, "oak")
    if outcome is State.RUNNING:
        assert await ask(fake_host, "oak", "load") == ("later" if private else "on disk")
        assert not await driver.is_paused(fake_host.local.rooms.directory(oak.id))
        await fake_host.call(StandbyRequest(instance="oak"))
    else:
        assert "ended" in (oak.exit_reason or "")
        await fake_host.call(StartRequest(instance="oak"))


async def test_a_capture_on_a_full_disk_lets_the_guest_run_on(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the pages are written, and the partial mem-file is removed."""
    await make(fake_host, State.STANDBY)
    await fake_host.call(RestoreRequest(instance="oak"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        for module in ("staging", "layers"):
            patch.setattr(f"coppice.memory.{module}.write_all", full)
        with pytest.raises(NoSpace):
            await fake_host.call(StandbyRequest(instance="oak"))
    await assert_tidy(fake_host, "oak")
    assert await ask(fake_host, "oak", "hostname") == "oak"
    await fake_host.call(StandbyRequest(instance="oak"))


async def test_a_vmm_that_copies_silently_cannot_be_captured(fake_vmm: Path, fake_home: Path) -> None:
    """A capture would lose memory that is not mapped from the mem-file.

    It is refused, and the guest runs on.
    """
    driver = FakeDriver(fake_vmm, copies_silently=True)
    async with AsyncHost(fake_home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms, spares=0) as host:
        await make(host, State.STANDBY)
        await host.call(RestoreRequest(instance="oak"))
        with pytest.raises(IntegrityError):
            await host.call(StandbyRequest(instance="oak"))
        assert await ask(host, "oak", "hostname") == "oak"
        await assert_tidy(host, "oak")
    await driver.end(fake_home / "instances")


@pytest.mark.parametrize("operation", ["run", "restore", "fork"])
async def test_a_guest_that_never_answers_is_not_running(fake_home: Path, driver: FakeDriver, operation: str) -> None:
    """Without an acknowledged identity there is no Running: the operation fails within its
    deadline, with a hint.
    """
    async with AsyncHost(
        fake_home, driver=driver, deadlines=Deadlines(boot=0.1, ready=0.1), open_rooms=open_rooms
    ) as host:
        if operation != "run":
            await make(host, State.STANDBY)
        gate = driver.faults.hold_at("identity")
        if operation == "fork":
            (result,) = (await host.call(ForkRequest(instance="oak"))).results
            assert result.error_code == GuestTimeout.code
        else:
            with pytest.raises(GuestTimeout) as failure:
                await (boot(host) if operation == "run" else host.call(RestoreRequest(instance="oak")))
            assert failure.value.hint
        gate.release.set()
        instances = await assert_tidy(host, *([] if operation == "run" else ["oak"]))
        assert [vm.state for vm in instances] == ([] if operation == "run" else [State.STANDBY])


async def test_the_error_says_why_the_vmm_ended(fake_host: AsyncHost) -> None:
    """The message has the end of the VMM's log, here for a vmstate of another memory."""
    oak = await make(fake_host, State.STANDBY)
    state = fake_host.local.rooms.directory(oak.id) / files.VMSTATE
    state.chmod(0o644)
    state.write_bytes(re.sub(rb'"generation":\d+', b'"generation":777', state.read_bytes()))
    with pytest.raises(VmmDied, match="cannot load the vmstate"):
        await fake_host.call(RestoreRequest(instance="oak"))
    assert (await fake_host.call(GetRequest(instance="oak"))).state is State.STANDBY


async def test_a_crash_during_an_exec_is_an_error_and_then_a_stop(fake_host: AsyncHost) -> None:
    """The `exec` raises VmmDied; after that the record shows why the machine is Stopped."""
    await boot(fake_host)
    with pytest.raises(VmmDied):
        await fake_host.call(ExecRequest(instance="oak", argv=["crash"]))
    oak = await fake_host.call(GetRequest(instance="oak"))
    assert (oak.state, oak.vmm) == (State.STOPPED, None)
    assert "signal 9" in (oak.exit_reason or "")
    await assert_tidy(fake_host, "oak")


async def test_a_full_disk_at_a_new_machine_leaves_nothing(
    fake_host: AsyncHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the overlay is made, or when a fork's files are placed.

    The error says so, and the files are removed.
    """

    def full(*_: object, **__: object) -> None:
        raise NoSpace("the disk is full", hint="free some")

    def place_and_be_full(*arguments: Any, **options: Any) -> None:
        place_fork(*arguments, **options)
        full()

    await make(fake_host, State.TEMPLATE)
    place_fork = directory.place_fork
    monkeypatch.setattr("coppice.content.overlay.clone_file", full)
    monkeypatch.setattr(directory, "place_fork", place_and_be_full)
    with pytest.raises(NoSpace):
        await boot(fake_host, "elm")
    (result,) = (await fake_host.call(ForkRequest(instance="oak"))).results
    assert result.error_code == NoSpace.code
    await assert_tidy(fake_host, "oak")


async def test_the_database_of_a_closed_host_is_closed(fake_host: AsyncHost) -> None:
    """Using a closed host is the caller's mistake, and the error says so."""
    await fake_host.close()
    await fake_host.close()
    with pytest.raises(UsageError, match="not open"):
        await fake_host.call(LsRequest())


def open_files() -> int:
    """Return the number of this process's file descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_failures_leak_nothing(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Thirty failures in a row leak no file descriptor and no task."""
    await make(fake_host, State.TEMPLATE)

    async def fail(step: str) -> None:
        driver.faults.fail_at(step)
        assert (await fake_host.call(ForkRequest(instance="oak"))).succeeded == 0

    for step in ("restore", "restored", "identity"):
        await fail(step)
    await asyncio.gather(*driver.guests_that_ended())
    tasks, descriptors = len(asyncio.all_tasks()), open_files()
    for _ in range(10):
        for step in ("restore", "restored", "identity"):
            await fail(step)
    await asyncio.gather(*driver.guests_that_ended())
    assert len(asyncio.all_tasks()) == tasks
    assert open_files() == descriptors
