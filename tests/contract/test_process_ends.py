"""The end of a machine's process is found out, recorded and shown, whatever happens to the machine."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from coppice.client import AsyncHost
from coppice.errors import GuestTimeout, IllegalTransition, NotFound, VmmDied
from coppice.model import MIB, Instance, State
from coppice.model.events import Event
from coppice.requests import (
    EventsRequest,
    ForkRequest,
    GetRequest,
    InspectRequest,
    LogsRequest,
    LsRequest,
    OpenExecRequest,
    PromoteRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
    WaitProcessRequest,
    WaitRequest,
)
from coppice.state import locks
from coppice.vmm import driver as files
from fakes.clock import FakeClock
from fakes.driver import FakeDriver
from fakes.hosting import ask, boot, make
from fakes.supervising import event_of, supervised


async def end(host: AsyncHost, name: str = "oak", status: int = 3) -> None:
    """End a machine's process."""
    await ask(host, name, "remember", "exited", str(status))


async def get(host: AsyncHost, name: str = "oak") -> Instance:
    return await host.call(GetRequest(instance=name))


async def exits(host: AsyncHost) -> list[Event]:
    """Return the events of ends so far."""
    async with host.stream(EventsRequest(after=0, follow=False)) as events:
        return [event async for event in events if event.kind == "exited"]


def status_of(instance: Instance) -> int | None:
    return None if instance.process_end is None else instance.process_end.exit_code


@pytest.mark.parametrize("look", ["get", "ls", "inspect"])
async def test_the_next_look_finds_it(fake_host: AsyncHost, other: AsyncHost, look: str) -> None:
    """And records it, with one event."""
    await boot(fake_host, "oak")
    assert status_of(await get(fake_host)) is None
    await end(fake_host)
    if look == "ls":
        (found,) = await other.call(LsRequest())
    elif look == "inspect":
        found = (await other.call(InspectRequest(instance="oak"))).instance
    else:
        found = await get(other)
    assert (found.state, status_of(found)) == (State.RUNNING, 3)
    assert fake_host.local.rooms.store.get("oak") == found
    for _ in range(2):
        await other.call(LsRequest())
    (event,) = await exits(fake_host)
    assert (event.name, event.detail, event.state) == ("oak", "status 3", State.RUNNING)


async def test_a_signal_is_named(fake_host: AsyncHost) -> None:
    """In the record and in the event."""
    await boot(fake_host, "oak")
    await end(fake_host, status=128 + signal.SIGKILL)
    found = (await get(fake_host)).process_end
    assert found is not None
    assert (found.exit_code, found.signal) == (137, signal.SIGKILL)
    assert [event.detail for event in await exits(fake_host)] == ["status 137 (signal 9)"]


async def test_a_quiet_machine_is_not_asked_again(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """A list of a hundred quiet machines talks to none of them."""
    await boot(fake_host, "oak")
    for _ in range(3):
        await fake_host.call(LsRequest())
        await get(fake_host)
    asked = driver.faults.reached["health"]
    await fake_host.call(LsRequest())
    assert driver.faults.reached["health"] == asked


async def test_a_full_console_hides_nothing(fake_host: AsyncHost) -> None:
    """The VMM writes no more to it, so the agent is asked at each look."""
    oak = await boot(fake_host, "oak")
    console = fake_host.local.rooms.directory(oak.id) / files.CONSOLE_LOG
    os.truncate(console, 64 * MIB)
    await get(fake_host)
    await end(fake_host)
    os.truncate(console, 64 * MIB)
    assert status_of(await get(fake_host)) == 3


async def test_a_silent_agent_delays_no_list(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """For long: the machine is shown as it is recorded. The next look finds the end."""
    await boot(fake_host, "oak")
    await get(fake_host)
    gate = driver.faults.hold_at("health")
    await end(fake_host)
    async with asyncio.timeout(8):
        (found,) = await fake_host.call(LsRequest())
    assert status_of(found) is None
    gate.release.set()
    assert status_of(await get(fake_host)) == 3


async def test_an_operation_under_way_does_not_hide_it(fake_host: AsyncHost) -> None:
    """It is shown, and recorded when the operation has ended."""
    oak = await boot(fake_host, "oak")
    await end(fake_host)
    async with locks.hold(fake_host.local.rooms.layout.lock(oak.id), what="oak"):
        assert status_of(await get(fake_host)) == 3
        assert status_of(fake_host.local.rooms.store.get("oak")) is None
    assert status_of(await get(fake_host)) == 3
    assert status_of(fake_host.local.rooms.store.get("oak")) == 3


async def test_standby_and_restore_keep_it(fake_host: AsyncHost) -> None:
    """Also an end that nobody had noticed before the capture. A boot is a new run."""
    await boot(fake_host, "oak")
    await end(fake_host)
    await fake_host.call(StandbyRequest(instance="oak"))
    assert status_of(await fake_host.call(RestoreRequest(instance="oak"))) == 3
    assert status_of((await fake_host.call(StandbyRequest(instance="oak"))).instance) == 3
    await fake_host.call(RestoreRequest(instance="oak"))
    stopped = await fake_host.call(StopRequest(instance="oak", grace_s=0))
    assert status_of(stopped) == 3
    assert status_of(await fake_host.call(StartRequest(instance="oak"))) is None
    assert len(await exits(fake_host)) == 1


@pytest.mark.parametrize("ended", [True, False])
async def test_a_fork_has_the_state_of_its_source(fake_host: AsyncHost, ended: bool) -> None:
    """Of the instant of the capture, whoever has noticed the end; with an event of its own.

    Whether a look has found out that the source's had ended too depends on the moment.
    """
    await boot(fake_host, "oak")
    if ended:
        await end(fake_host)
    (early,) = (await fake_host.call(ForkRequest(instance="oak", from_running=True, names=["early"]))).instances
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(PromoteRequest(instance="oak"))
    report = await fake_host.call(ForkRequest(instance="oak", names=["elm", "fir"], count=2, atomic=True))
    assert [status_of(fork) for fork in (early, *report.instances)] == [3 if ended else None] * 3
    named = [event.name for event in await exits(fake_host)]
    assert {*named} - {"oak"} == ({"early", "elm", "fir"} if ended else set())
    assert len(named) == len({*named})
    if not ended:
        await end(fake_host, "elm", 4)
        assert [status_of(await get(fake_host, name)) for name in ("elm", "fir")] == [4, None]


async def test_a_supervisor_notices_at_once(fake_host: AsyncHost, clock: FakeClock) -> None:
    """Nobody looks, the machine has no policy, and no time passes for the supervisor."""
    await boot(fake_host, "before")
    async with supervised(fake_host, clock):
        await boot(fake_host, "oak")
        for name in ("before", "oak"):
            await end(fake_host, name)
            event = await event_of(fake_host, lambda event, name=name: (event.kind, event.name) == ("exited", name))  # type: ignore[misc]
            assert event.detail == "status 3"


async def test_a_supervisor_notices_what_happened_without_it(fake_host: AsyncHost, clock: FakeClock) -> None:
    """When it starts. A machine whose agent is busy is asked again."""
    await boot(fake_host, "oak")
    await end(fake_host)
    async with supervised(fake_host, clock):
        await event_of(fake_host, lambda event: event.kind == "exited")


async def test_a_wait_ends_with_the_process(fake_host: AsyncHost, other: AsyncHost) -> None:
    """At once, and also if it had ended before. The record has it."""
    await boot(fake_host, "oak")
    waiting = asyncio.create_task(other.call(WaitProcessRequest(instance="oak")))
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done
    await end(fake_host)
    async with asyncio.timeout(20):
        assert status_of(await waiting) == 3
        assert status_of(fake_host.local.rooms.store.get("oak")) == 3
        assert status_of(await other.call(WaitProcessRequest(instance="oak"))) == 3
        await fake_host.call(StandbyRequest(instance="oak"))
        assert status_of(await other.call(WaitProcessRequest(instance="oak"))) == 3


async def test_a_wait_knows_the_status_of_a_busy_agent(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """It is the one that the wait has got. The record follows."""
    await boot(fake_host, "oak")
    waiting = asyncio.create_task(fake_host.call(WaitProcessRequest(instance="oak")))
    await asyncio.wait({waiting}, timeout=0.2)
    gate = driver.faults.hold_at("health")
    await end(fake_host)
    async with asyncio.timeout(20):
        assert status_of(await waiting) == 3
    gate.release.set()
    assert status_of(await get(fake_host)) == 3


async def test_a_wait_asks_an_older_agent(fake_host: AsyncHost, other: AsyncHost) -> None:
    """Of which the process is no command that a client can attach to. The end of the machine ends the wait too."""
    for name, how in (("oak", end), ("elm", None)):
        vm = await boot(fake_host, name)
        await ask(fake_host, name, "remember", "older", "yes")
        waiting = asyncio.create_task(other.call(WaitProcessRequest(instance=name)))
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        assert not done
        assert vm.vmm is not None
        if how is not None:
            await how(fake_host, name)
        else:
            os.kill(vm.vmm.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            found = await waiting
        assert status_of(found) == (3 if how else None)
        assert found.state is (State.RUNNING if how else State.STOPPED)


async def test_a_wait_ends_with_the_machine(fake_host: AsyncHost, other: AsyncHost) -> None:
    """Which may tell no status. A machine that does not run has ended."""
    oak = await boot(fake_host, "oak")
    waiting = asyncio.create_task(other.call(WaitProcessRequest(instance="oak")))
    await asyncio.wait({waiting}, timeout=0.2)
    assert oak.vmm is not None
    os.kill(oak.vmm.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        found = await waiting
    assert (found.state, found.ending, found.process_end) == (State.STOPPED, "failed", None)
    assert await other.call(WaitProcessRequest(instance="oak")) == found


@pytest.mark.parametrize("request_", [WaitProcessRequest(instance="oak"), WaitRequest(instance="oak", deadline_s=30)])
async def test_a_wait_ends_after_the_stop(
    fake_host: AsyncHost, other: AsyncHost, driver: FakeDriver, request_: WaitProcessRequest | WaitRequest
) -> None:
    """And not with its VMM: until the stop is recorded, the record says that the machine runs."""
    await boot(fake_host, "oak")
    waiting = asyncio.create_task(other.call(request_))
    gate = driver.faults.hold_at("quit")  # the guest has powered off by then
    stopping = asyncio.create_task(fake_host.call(StopRequest(instance="oak")))
    async with asyncio.timeout(30):
        await gate.reached.wait()
        await asyncio.wait({waiting}, timeout=0.5)
        gate.release.set()
        assert (await stopping).state is State.STOPPED
        assert (await waiting).state is State.STOPPED


@pytest.mark.parametrize("request_", [WaitProcessRequest(instance="oak"), WaitRequest(instance="oak", deadline_s=30)])
async def test_a_wait_for_a_machine_that_is_being_stopped_ends_with_it(
    fake_host: AsyncHost, other: AsyncHost, driver: FakeDriver, request_: WaitProcessRequest | WaitRequest
) -> None:
    """It need not have begun before the stop."""
    await boot(fake_host, "oak")
    gate = driver.faults.hold_at("quit")
    stopping = asyncio.create_task(fake_host.call(StopRequest(instance="oak")))
    async with asyncio.timeout(30):
        await gate.reached.wait()
        waiting = asyncio.create_task(other.call(request_))
        await asyncio.wait({waiting}, timeout=0.2)
        gate.release.set()
        assert (await stopping).state is State.STOPPED
        assert (await waiting).state is State.STOPPED


@pytest.mark.parametrize("request_", [WaitProcessRequest(instance="oak"), WaitRequest(instance="oak", deadline_s=30)])
async def test_a_wait_names_a_machine_that_was_removed(
    fake_host: AsyncHost, other: AsyncHost, request_: WaitProcessRequest | WaitRequest
) -> None:
    """A removal ends a wait with an error that has the name which the caller gave."""
    await boot(fake_host, "oak")
    waiting = asyncio.create_task(other.call(request_))
    await asyncio.wait({waiting}, timeout=0.2)
    await fake_host.call(RmRequest(instance="oak"))
    async with asyncio.timeout(30):
        with pytest.raises(NotFound, match=r"\boak\b"):
            await waiting


@pytest.mark.parametrize(
    ("call", "said", "hint"),
    [
        (StandbyRequest(instance="oak"), "oak was put into standby", "coppice restore oak"),
        (StopRequest(instance="oak", grace_s=0), "oak was stopped", "coppice start oak"),
        (RmRequest(instance="oak"), "oak was removed", "coppice ls"),
        (None, "closed the connection to its agent", "coppice inspect oak"),
    ],
    ids=["standby", "stop", "rm", "killed"],
)
async def test_a_lost_session_tells_what_was_done_to_its_machine(
    fake_host: AsyncHost,
    other: AsyncHost,
    call: StandbyRequest | StopRequest | RmRequest | None,
    said: str,
    hint: str,
) -> None:
    """A user whose command was cut off learns how to go on."""
    oak = await boot(fake_host, "oak")

    async def lose() -> None:
        async with asyncio.timeout(30), other.stream(OpenExecRequest(instance="oak", argv=["sleep"])) as session:
            waiting = asyncio.create_task(session.wait())
            if call is not None:
                await fake_host.call(call)
            elif oak.vmm is not None:
                os.kill(oak.vmm.pid, signal.SIGKILL)
            await waiting

    with pytest.raises(VmmDied, match=said) as lost:
        await lose()
    assert hint in (lost.value.hint or "")


async def test_a_followed_log_ends_with_the_removal(fake_host: AsyncHost, other: AsyncHost) -> None:
    """Without an error: all lines were read."""
    oak = await boot(fake_host, "oak")
    (fake_host.local.rooms.directory(oak.id) / files.CONSOLE_LOG).write_text("ready\n")
    async with asyncio.timeout(30), other.stream(LogsRequest(instance="oak", follow=True)) as lines:
        await fake_host.call(RmRequest(instance="oak"))
        assert [line async for line in lines] == [b"ready"]


async def test_a_wait_has_a_deadline(fake_host: AsyncHost) -> None:
    """And says how to end the process."""
    await boot(fake_host, "oak")
    with pytest.raises(GuestTimeout, match=r"the process of oak still runs after 0\.2 s.*coppice kill oak main"):
        await fake_host.call(WaitProcessRequest(instance="oak", deadline_s=0.2))


async def test_a_wait_does_not_follow_a_standby(fake_host: AsyncHost, other: AsyncHost) -> None:
    """The process has not ended: it goes on after the restore."""
    await make(fake_host, State.STANDBY)
    with pytest.raises(IllegalTransition, match="Standby"):
        await fake_host.call(WaitProcessRequest(instance="oak"))
    await fake_host.call(RestoreRequest(instance="oak"))
    waiting = asyncio.create_task(other.call(WaitProcessRequest(instance="oak")))
    await asyncio.wait({waiting}, timeout=0.2)
    await fake_host.call(StandbyRequest(instance="oak"))
    async with asyncio.timeout(20):
        with pytest.raises(IllegalTransition, match="standby before its process ended"):
            await waiting
