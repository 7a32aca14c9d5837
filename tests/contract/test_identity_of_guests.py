"""A guest's identity: the right time when it is Running, and no change to its owner's settings."""

from __future__ import annotations

import asyncio
import errno
import time

from coppice.agent.control import CLOCK_ATTEMPTS, CLOCK_ERROR_S
from coppice.client import AsyncHost
from coppice.errors import GuestRefused
from coppice.model import Instance, State
from coppice.requests import ForkRequest, RestoreRequest, StandbyRequest, StartRequest, StopRequest
from fakes.driver import FakeDriver
from fakes.hosting import ask, boot, make
from fakes.wire import Fault


async def _source(fake_host: AsyncHost, driver: FakeDriver) -> Instance:
    """Make a machine to fork, and count the corrections of clocks from then on: on a busy host its
    own boot needs some too.
    """
    oak = await make(fake_host, State.STANDBY)
    driver.faults.reached.clear()
    return oak


async def test_the_clock_of_a_slow_start_is_right(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A guest that reads its identity half a second late still gets the host's time."""
    oak = await _source(fake_host, driver)
    slow = driver.faults.hold_at("identity")
    forking = asyncio.create_task(fake_host.call(ForkRequest(instance=oak.id, names=["acorn"])))
    async with asyncio.timeout(10):
        await slow.reached.wait()
    await asyncio.sleep(0.5)
    slow.release.set()
    (acorn,) = (await forking).instances
    late_s = driver.guest_state(fake_host.local.rooms.directory(acorn.id)).clock_late_ns / 1e9
    assert late_s <= CLOCK_ERROR_S
    assert 1 <= driver.faults.reached["clock"] <= CLOCK_ATTEMPTS


async def test_corrections_of_the_clock_are_limited(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """On a slow host each correction is late too.

    After a few, the machine is Running with the best time available.
    """
    oak = await _source(fake_host, driver)
    before = time.monotonic()
    gates = [driver.faults.hold_at("identity"), *(driver.faults.hold_at("clock", nth=n) for n in (1, 2, 3, 4))]

    async def release_late() -> None:
        for gate in gates[: 1 + CLOCK_ATTEMPTS]:
            await gate.reached.wait()
            await asyncio.sleep(3 * CLOCK_ERROR_S)
            gate.release.set()

    async with asyncio.timeout(10):
        (report, _) = await asyncio.gather(
            fake_host.call(ForkRequest(instance=oak.id, names=["acorn"])), release_late()
        )
    assert report.instances[0].state is State.RUNNING
    assert driver.faults.reached["clock"] == CLOCK_ATTEMPTS
    assert time.monotonic() - before < 10


async def test_corrections_of_the_clock_stay_within_the_limit(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A fork needs a correction only if its identity came late, and never more than the limit."""
    oak = await _source(fake_host, driver)
    report = await fake_host.call(ForkRequest(instance=oak.id, count=8))
    assert report.succeeded == 8
    assert driver.faults.reached["clock"] <= 8 * CLOCK_ATTEMPTS


async def test_a_restored_machine_keeps_what_its_owner_changed(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """New and booted machines receive names and ids.

    A restored machine keeps those that its owner has set since.
    """
    oak = await boot(fake_host, hostname="given")
    directory = fake_host.local.rooms.directory(oak.id)
    first = driver.guest_state(directory)
    assert (first.hostname, bool(first.mac), bool(first.address)) == ("given", True, True)
    mine = {"hostname": "mine", "machine_id": "f" * 32}
    driver.change_guest(directory, **mine)
    await fake_host.call(StandbyRequest(instance=oak.id))
    await fake_host.call(RestoreRequest(instance=oak.id))
    restored = driver.guest_state(directory)
    assert {name: getattr(restored, name) for name in mine} == mine
    assert restored.serial == first.serial + 1
    assert restored.entropy != first.entropy
    await fake_host.call(StandbyRequest(instance=oak.id))
    (fork,) = (await fake_host.call(ForkRequest(instance=oak.id, names=["acorn"]))).instances
    assert await ask(fake_host, fork, "hostname") == "acorn"
    assert driver.guest_state(fake_host.local.rooms.directory(fork.id)).machine_id != "f" * 32
    await fake_host.call(RestoreRequest(instance=oak.id))
    await fake_host.call(StopRequest(instance=oak.id))
    await fake_host.call(StartRequest(instance=oak.id))
    assert driver.guest_state(directory).hostname == "given"


async def test_a_refused_fork_says_what_to_do(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A guest with a read-only root cannot clear its random seed.

    The hint must be about that, not about a path that the user never named.
    """
    oak = await make(fake_host, State.STANDBY)
    driver.faults.fail_at(
        "identity",
        error=lambda: Fault(errno.EROFS, "random-seed: /var/lib/systemd/random-seed: Read-only file system"),
    )
    (result,) = (await fake_host.call(ForkRequest(instance=oak.id, names=["acorn"]))).results
    assert result.error_code == GuestRefused.code
    assert "/var/lib/systemd/random-seed: Read-only file system" in (result.error or "")
    assert "mount -o remount,rw /" in (result.error or "")
