"""A check by a line of the console succeeds once the memory that runs has printed its text."""

from __future__ import annotations

import asyncio

import pytest

from coppice.client import AsyncHost
from coppice.errors import GuestTimeout, UsageError
from coppice.host.probes import Probe
from coppice.model import HealthCheck, Instance, State
from coppice.requests import (
    ExecRequest,
    ForkRequest,
    ReadyRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    SnapshotRestoreRequest,
    StandbyRequest,
    UpdateRequest,
)
from fakes.clock import FakeClock
from fakes.hosting import boot, make
from fakes.supervising import event_of, supervised

CHECK = HealthCheck(kind="log", text="ready to serve")


async def say(host: AsyncHost, instance: Instance | str, text: str) -> None:
    """Have a guest print on its console."""
    key = instance if isinstance(instance, str) else instance.id
    await host.call(ExecRequest(instance=key, argv=["print", text]))


async def is_ready(host: AsyncHost, instance: Instance | str) -> bool:
    """Return whether the check of a machine succeeds now; if not, its console must be the reason."""
    machine = (await host.get(instance if isinstance(instance, str) else instance.id)).record
    assert machine.health_check is not None
    failure = await Probe(host.local.rooms, machine, machine.health_check).failure()
    assert failure == "" or "its console does not show" in failure
    return not failure


async def test_it_waits_for_the_line(fake_host: AsyncHost) -> None:
    """However the line arrives."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    waiting = asyncio.create_task(fake_host.call(ReadyRequest(instance="oak")))
    await say(fake_host, oak, "not yet rea")
    await say(fake_host, oak, "dy, now ready to")
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done
    await say(fake_host, oak, " serve")
    assert (await waiting).state is State.RUNNING


async def test_forks_of_a_ready_memory_are_ready(fake_host: AsyncHost) -> None:
    """The service runs in them too. Their consoles begin empty."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    await say(fake_host, oak, "ready to serve")
    template = await (await fake_host.get("oak")).freeze()
    assert template.record.capture is not None
    assert template.record.capture.printed == "ready to serve"
    forks = (await fake_host.call(ForkRequest(instance="oak", count=2, atomic=True))).instances
    (grown,) = (await fake_host.call(ForkRequest(instance=forks[0].id, from_running=True, atomic=True))).instances
    for fork in (*forks, grown):
        assert await is_ready(fake_host, fork)


async def test_another_text_is_waited_for_in_the_fork(fake_host: AsyncHost) -> None:
    """The source did not look for it. A part of what the source looked for was printed with it."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    await say(fake_host, oak, "warm, ready to serve")
    await (await fake_host.get("oak")).freeze()

    async def fork(text: str) -> Instance:
        check = HealthCheck(kind="log", text=text)
        return (await fake_host.call(ForkRequest(instance="oak", health_check=check, atomic=True))).instances[0]

    assert await is_ready(fake_host, await fork("to serve"))
    warm = await fork("warm")
    assert not await is_ready(fake_host, warm)
    await say(fake_host, warm, "warm again")
    assert await is_ready(fake_host, warm)


@pytest.mark.parametrize("how", ["standby", "running"])
async def test_a_line_may_be_printed_across_a_capture(fake_host: AsyncHost, how: str) -> None:
    """A guest is paused at any instant, also in the middle of a line."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    await say(fake_host, oak, "ready to ")
    if how == "standby":
        await fake_host.call(StandbyRequest(instance="oak"))
    forked = await fake_host.call(ForkRequest(instance="oak", from_running=how == "running", atomic=True))
    (fork,) = forked.instances
    assert not await is_ready(fake_host, fork)
    await say(fake_host, fork, "serve")
    assert await is_ready(fake_host, fork)


async def test_what_is_printed_after_a_capture_is_not_in_it(fake_host: AsyncHost) -> None:
    """Neither in a fork of the capture, nor if the source returns to it."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    await fake_host.call(SnapshotRequest(instance="oak", name="early"))
    await say(fake_host, oak, "ready to serve")
    assert await is_ready(fake_host, oak)
    await fake_host.call(SnapshotRequest(instance="oak", name="late"))
    for name, ready in (("early", False), ("late", True)):
        (fork,) = (await fake_host.call(SnapshotForkRequest(snapshot=name, health_check=CHECK, atomic=True))).instances
        assert await is_ready(fake_host, fork) is ready
        back = await fake_host.call(SnapshotRestoreRequest(snapshot=name, start=True))
        assert await is_ready(fake_host, back) is ready


async def test_a_boot_begins_anew(fake_host: AsyncHost) -> None:
    """Lines of an earlier run are on the console, and do not count. Those before a standby do."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    await say(fake_host, oak, "ready to serve")
    machine = await fake_host.get("oak")
    await machine.standby()
    await machine.restore()
    assert await is_ready(fake_host, oak)
    await machine.stop()
    await machine.start()
    assert not await is_ready(fake_host, oak)
    await say(fake_host, oak, "ready to serve")
    assert await is_ready(fake_host, oak)
    await machine.standby()
    (fork,) = (await fake_host.call(ForkRequest(instance="oak", target=State.STOPPED, atomic=True))).instances
    await (await fake_host.get(fork.id)).start()
    assert not await is_ready(fake_host, fork)


async def test_a_check_that_is_given_later(fake_host: AsyncHost) -> None:
    """All that this run has printed counts."""
    oak = await boot(fake_host, "oak")
    await say(fake_host, oak, "ready to serve")
    await fake_host.call(UpdateRequest(instance="oak", health_check=CHECK))
    assert await is_ready(fake_host, oak)


async def test_a_process_that_has_failed_is_not_ready(fake_host: AsyncHost) -> None:
    """The line is of the past. One that ended well may have left a daemon."""
    oak = await boot(fake_host, "oak", health_check=CHECK)
    await say(fake_host, oak, "ready to serve")
    await fake_host.call(ExecRequest(instance="oak", argv=["remember", "exited", "0"]))
    assert await is_ready(fake_host, oak)
    await fake_host.call(ExecRequest(instance="oak", argv=["remember", "exited", "1"]))
    with pytest.raises(GuestTimeout, match="its process exited with status 1"):
        await fake_host.call(ReadyRequest(instance="oak", deadline_s=2))


async def test_a_server_checks_by_a_line(fake_host: AsyncHost, clock: FakeClock) -> None:
    """As by the other checks."""
    async with supervised(fake_host, clock):
        oak = await boot(fake_host, "oak", health_check=HealthCheck(kind="log", text="ready", interval_s=10))
        await event_of(fake_host, lambda event: event.detail.startswith("starting"))
        await say(fake_host, oak, "ready")
        clock.forward(10)
        await event_of(fake_host, lambda event: event.detail.startswith("healthy"))


@pytest.mark.parametrize("text", ["", "two\nlines", "x" * 501])
async def test_a_text_that_no_line_has(fake_host: AsyncHost, text: str) -> None:
    """It is refused."""
    with pytest.raises(UsageError, match="part of a line"):
        await make(fake_host, State.STANDBY, health_check=HealthCheck(kind="log", text=text))
