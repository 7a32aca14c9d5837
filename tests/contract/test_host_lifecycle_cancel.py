"""A cancellation at any wait of any operation leads to the state before or the state after, and
leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from coppice.client import AsyncHost
from coppice.model import State
from coppice.requests import (
    DemoteRequest,
    ExecRequest,
    ForkRequest,
    GetRequest,
    LsRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    RunRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from fakes.driver import FakeDriver
from fakes.hosting import ask, assert_tidy, boot, cancelled_at, make, make_threads_late
from fakes.rooms import IMAGE

_MOST_WAITS = 400


@pytest.fixture(autouse=True)
def _late_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay each thread, since a thread cannot be cancelled: a cleanup that does not wait for it
    must fail the test.
    """
    make_threads_late(monkeypatch)


async def test_a_cancelled_run_leaves_nothing(fake_host: AsyncHost) -> None:
    """The run is cancelled at each of its waits in turn, until it completes."""
    for nth in range(1, _MOST_WAITS):
        came = await cancelled_at(boot(fake_host), nth)
        if not came:
            break
        await assert_tidy(fake_host)
    else:
        pytest.fail("a run waits more often than this test cancels")
    assert nth > 10
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("target", [State.RUNNING, State.STANDBY])
async def test_a_cancelled_fan_out_leaves_nothing(fake_host: AsyncHost, target: State) -> None:
    """Finished children are removed too, because the caller has not learned their names."""
    await make(fake_host, State.TEMPLATE)
    for nth in range(1, _MOST_WAITS):
        came = await cancelled_at(
            fake_host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2, target=target)), nth
        )
        if not came:
            break
        await assert_tidy(fake_host, "oak")
    else:
        pytest.fail("a fork waits more often than this test cancels")
    assert nth > 2
    await assert_tidy(fake_host, "oak", "elm", "fir")


@pytest.mark.parametrize("step", ["manifest", "restore", "restored", "identity", "quit"])
async def test_a_fan_out_cancelled_while_its_children_are_at_work(
    fake_host: AsyncHost, driver: FakeDriver, step: str
) -> None:
    """When it is cancelled, one child waits at the step, one has passed it, and one has yet to
    reach it.
    """
    await make(fake_host, State.TEMPLATE)
    if step == "quit":
        driver.faults.fail_at("identity", nth=2)
    gate = driver.faults.hold_at(step, nth=1 if step == "quit" else 2)
    task = asyncio.create_task(fake_host.call(ForkRequest(instance="oak", count=3)))
    await asyncio.wait_for(gate.reached.wait(), 10)
    task.cancel()
    await asyncio.sleep(0)
    gate.release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_tidy(fake_host, "oak")


@pytest.mark.parametrize("private", [False, True], ids=["first boot", "private mapping"])
async def test_a_cancelled_standby_runs_or_stands_by(fake_host: AsyncHost, driver: FakeDriver, private: bool) -> None:
    """Before the commit the guest runs on; after it the capture is complete.

    Either way the guest keeps what it knew.
    """
    await boot(fake_host)
    await ask(fake_host, "oak", "remember", "key", "value")
    outcomes: list[State] = []
    for nth in range(1, _MOST_WAITS):
        oak = await fake_host.call(GetRequest(instance="oak"))
        if private and oak.mem_file is None:
            await fake_host.call(StandbyRequest(instance="oak"))
            oak = await fake_host.call(RestoreRequest(instance="oak"))
        came = await cancelled_at(fake_host.call(StandbyRequest(instance="oak")), nth)
        (oak,) = await assert_tidy(fake_host, "oak")
        outcomes.append(oak.state)
        if oak.state is State.RUNNING:
            assert not await driver.is_paused(fake_host.local.rooms.directory(oak.id))
        else:
            await fake_host.call(RestoreRequest(instance="oak"))
            assert await ask(fake_host, "oak", "recall", "key") == "value"
            if not private:
                await fake_host.call(StopRequest(instance="oak"))
                await fake_host.call(StartRequest(instance="oak"))
                await ask(fake_host, "oak", "remember", "key", "value")
        assert await ask(fake_host, "oak", "recall", "key") == "value"
        if not came:
            break
    else:
        pytest.fail("a standby waits more often than this test cancels")
    assert set(outcomes) == {State.RUNNING, State.STANDBY}
    assert outcomes[-1] is State.STANDBY


@pytest.mark.parametrize(
    ("before", "after"),
    [(State.STANDBY, "restore"), (State.STOPPED, "start"), (State.RUNNING, "stop"), (State.RUNNING, "stop at once")],
)
async def test_a_cancelled_change_of_state_is_done_or_undone(fake_host: AsyncHost, before: State, after: str) -> None:
    """A cancelled restore or start is undone.

    A cancelled stop stops the machine, because a guest that began to end cannot run on.
    """

    def change() -> Coroutine[Any, Any, Any]:
        match after:
            case "restore":
                return fake_host.call(RestoreRequest(instance="oak"))
            case "start":
                return fake_host.call(StartRequest(instance="oak"))
            case "stop":
                return fake_host.call(StopRequest(instance="oak"))
            case _:
                return fake_host.call(StopRequest(instance="oak", grace_s=0))

    target = State.STOPPED if after.startswith("stop") else State.RUNNING
    await make(fake_host, before)
    for nth in range(1, _MOST_WAITS):
        came = await cancelled_at(change(), nth)
        (oak,) = await assert_tidy(fake_host, "oak")
        assert oak.state in (before, target)
        if not came:
            break
        if oak.state is not before:
            await fake_host.call(RmRequest(instance="oak"))
            await make(fake_host, before)
    else:
        pytest.fail("the operation waits more often than this test cancels")
    assert oak.state is target
    assert nth > 2  # it was cancelled in its waits


@pytest.mark.parametrize("state", [State.RUNNING, State.TEMPLATE])
async def test_a_cancelled_removal_is_done_or_was_never_begun(fake_host: AsyncHost, state: State) -> None:
    """No half-removed instance is left."""
    for nth in range(1, _MOST_WAITS):
        if not await fake_host.call(LsRequest()):
            await make(fake_host, state)
        came = await cancelled_at(fake_host.call(RmRequest(instance="oak")), nth)
        instances = await fake_host.call(LsRequest())
        await assert_tidy(fake_host, *(vm.name for vm in instances))
        assert [vm.state for vm in instances] in ([], [state])
        if not came:
            break
    else:
        pytest.fail("a removal waits more often than this test cancels")
    assert await fake_host.call(LsRequest()) == []


async def test_a_cancelled_promotion_is_done_or_undone(fake_host: AsyncHost) -> None:
    """A promotion has one commit, which decides."""
    await make(fake_host, State.STANDBY)
    for nth in range(1, _MOST_WAITS):
        came = await cancelled_at(fake_host.call(PromoteRequest(instance="oak")), nth)
        (oak,) = await assert_tidy(fake_host, "oak")
        assert oak.state in (State.STANDBY, State.TEMPLATE)
        if not came:
            break
        await fake_host.call(DemoteRequest(instance="oak"))
    assert oak.state is State.TEMPLATE


async def test_a_cancelled_command_frees_its_port(fake_host: AsyncHost) -> None:
    """A guest has seven ports for sessions, so cancelled sessions must give theirs back."""
    await boot(fake_host)
    for _ in range(3):
        tasks = [asyncio.create_task(fake_host.call(ExecRequest(instance="oak", argv=["sleep"]))) for _ in range(7)]
        for nth in range(7):
            for _ in range(nth * 3):
                await asyncio.sleep(0)
            tasks[nth].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert await ask(fake_host, "oak", "hostname") == "oak"


async def test_a_deadline_of_the_callers_own_is_kept(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """`asyncio.timeout` around an operation ends it after its cleanup."""
    gate = driver.faults.hold_at("identity")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await fake_host.call(RunRequest(image=IMAGE, name="oak"))
    gate.release.set()
    await assert_tidy(fake_host)
