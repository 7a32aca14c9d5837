"""A machine that ended by itself is started again as its policy says."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from coppice.client import AsyncHost
from coppice.model import Instance, RestartPolicy, State
from coppice.model.events import Event
from coppice.requests import (
    ForkRequest,
    GetRequest,
    InspectRequest,
    LsRequest,
    StartRequest,
    StopRequest,
    UpdateRequest,
    WaitRequest,
)
from fakes.clock import FakeClock
from fakes.driver import FakeDriver
from fakes.hosting import ask, boot
from fakes.supervising import SOON_S, event_of, scheduled, supervised, until_state

ALWAYS = RestartPolicy(when="always", backoff_s=10)
ON_FAILURE = RestartPolicy(when="on-failure", backoff_s=10, max_attempts=2)


def kill(instance: Instance) -> None:
    """Kill the VMM of a running machine."""
    assert instance.vmm is not None
    os.kill(instance.vmm.pid, signal.SIGKILL)


def attempt(number: int) -> Callable[[Event], bool]:
    """Match the event of an attempt."""
    return lambda event: event.kind == "restart" and event.detail.startswith(f"attempt {number}")


async def test_a_killed_vmm_is_started_again(fake_host: AsyncHost, clock: FakeClock) -> None:
    """After the back-off, which doubles; a stable run ends the row of attempts."""
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", restart=ALWAYS)
        for number in (1, 2):
            kill(oak)
            at = await scheduled(fake_host, "oak")
            assert at - clock.now() == pytest.approx(10 * number)
            clock.forward(10 * number)
            event = await event_of(fake_host, attempt(number))
            assert "the VMM ended" in event.detail
            oak = await until_state(fake_host, "oak", State.RUNNING)
        (listed,) = await fake_host.call(LsRequest())
        inspected = (await fake_host.call(InspectRequest(instance="oak"))).instance
        assert listed.observed == inspected.observed
        assert listed.observed is not None
        assert listed.observed.attempts == 2
        clock.forward(61)
        while (await fake_host.call(GetRequest(instance="oak"))).observed.attempts:  # type: ignore[union-attr]
            pass
        kill(oak)
        assert await scheduled(fake_host, "oak") - clock.now() == pytest.approx(10)


async def test_a_clock_that_is_set_back_delays_no_attempt(fake_host: AsyncHost, clock: FakeClock) -> None:
    """The recorded time of the attempt would come much later. The back-off begins again."""
    async with supervised(fake_host, clock):
        kill(await boot(fake_host, "oak", restart=ALWAYS))
        before = await scheduled(fake_host, "oak")
        clock.back(100_000)
        async with asyncio.timeout(SOON_S):
            while (at := await scheduled(fake_host, "oak")) == before:
                pass
        assert at - clock.now() == pytest.approx(10)
        clock.forward(10)
        await event_of(fake_host, attempt(1))
        await until_state(fake_host, "oak", State.RUNNING)


@pytest.mark.parametrize(
    ("policy", "status", "starts"),
    [(ALWAYS, 0, True), (ALWAYS, 3, True), (ON_FAILURE, 3, True), (ON_FAILURE, 0, False)],
)
async def test_the_end_of_the_process_counts(
    fake_host: AsyncHost, clock: FakeClock, policy: RestartPolicy, status: int, starts: bool
) -> None:
    """A machine whose process failed is stopped and started again. With `on-failure` a machine
    whose process succeeded runs on.
    """
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", restart=policy)
        await ask(fake_host, oak, "remember", "exited", str(status))
        clock.forward(3)
        if starts:
            await scheduled(fake_host, "oak")
            assert (await fake_host.call(GetRequest(instance="oak"))).exit_reason == (
                f"its process exited with status {status}"
            )
            clock.forward(10)
            await event_of(fake_host, attempt(1))
            started = await until_state(fake_host, "oak", State.RUNNING)
            assert started.started_at != oak.started_at
        else:
            kill(await boot(fake_host, "later", restart=ALWAYS))
            await scheduled(fake_host, "later")  # the supervisor has looked at both
            assert (await fake_host.call(GetRequest(instance="oak"))).started_at == oak.started_at


async def test_it_gives_up(fake_host: AsyncHost, clock: FakeClock, driver: FakeDriver) -> None:
    """After the most attempts in a row, also if the machine does not even start. A start by hand
    begins a new row.
    """
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", restart=ON_FAILURE)
        driver.faults.fail_at("boot")
        driver.faults.fail_at("boot", nth=2)
        kill(oak)
        for number in (1, 2):
            await scheduled(fake_host, "oak")
            clock.forward(20)
            await event_of(fake_host, attempt(number))
        await event_of(fake_host, lambda event: event.detail.startswith("gave up after 2 attempts"))
        clock.forward(10_000)
        assert (await fake_host.call(GetRequest(instance="oak"))).state is State.STOPPED
        oak = await fake_host.call(StartRequest(instance="oak"))
        kill(oak)
        assert await scheduled(fake_host, "oak") - clock.now() == pytest.approx(10)


async def test_a_stop_is_no_end_by_itself(fake_host: AsyncHost, other: AsyncHost, clock: FakeClock) -> None:
    """Also one that comes during the back-off."""
    async with supervised(fake_host, clock):
        await boot(other, "oak", restart=ALWAYS)
        elm = await boot(other, "elm", restart=ALWAYS)
        await other.call(StopRequest(instance="oak", grace_s=0))
        kill(elm)
        await scheduled(other, "elm")
        await other.call(StopRequest(instance="elm"))
        kill(await boot(other, "ash", restart=ALWAYS))
        await scheduled(other, "ash")
        clock.forward(100)
        await until_state(other, "ash", State.RUNNING)
        for name in ("oak", "elm"):
            assert (await other.call(GetRequest(instance=name))).state is State.STOPPED


async def test_a_machine_that_ended_without_a_supervisor(
    fake_host: AsyncHost, other: AsyncHost, clock: FakeClock
) -> None:
    """The next one starts it, and goes on with the row of attempts and the time of the next one."""
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", restart=ALWAYS)
    kill(oak)
    assert (await other.call(WaitRequest(instance="oak", deadline_s=20))).ending == "failed"
    async with supervised(other, clock):
        at = await scheduled(other, "oak")
    clock.forward(5)
    async with supervised(fake_host, clock):
        assert await scheduled(fake_host, "oak") == at
        clock.forward(6)
        oak = await until_state(fake_host, "oak", State.RUNNING)
        kill(oak)
        assert await scheduled(fake_host, "oak") - clock.now() == pytest.approx(20)


async def test_policies_of_forks_and_changes(fake_host: AsyncHost, clock: FakeClock) -> None:
    """A fork has its source's policy unless it gets another one; a policy can be taken away."""
    await boot(fake_host, "oak", restart=ALWAYS)
    (fork,) = (await fake_host.call(ForkRequest(instance="oak", from_running=True))).instances
    assert fork.supervision is not None
    assert fork.supervision.restart == ALWAYS
    request = ForkRequest(instance="oak", from_running=True, restart=RestartPolicy())
    (plain,) = (await fake_host.call(request)).instances
    assert plain.supervision is None
    async with supervised(fake_host, clock):
        await fake_host.call(UpdateRequest(instance=fork.id, restart=RestartPolicy()))
        kill(fork)
        kill(await fake_host.call(GetRequest(instance="oak")))
        await scheduled(fake_host, "oak")
        found = await until_state(fake_host, fork.id, State.STOPPED)
        assert (found.observed, found.supervision) == (None, None)
