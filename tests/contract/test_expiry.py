"""An instance is removed, stopped or captured at the end of its lifetime, whatever process made it
and whatever process was there meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec
import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import Expired, UsageError
from coppice.host import LocalBackend
from coppice.host.upkeep import Next, Upkeep
from coppice.model import State, Supervision
from coppice.model.events import Event
from coppice.requests import (
    ForkRequest,
    LsRequest,
    RmRequest,
    SnapshotForkRequest,
    SnapshotRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
    UpdateRequest,
)
from coppice.state import locks
from fakes.clock import FakeClock
from fakes.hosting import assert_tidy, boot, make
from fakes.supervising import event_of, exists, supervised, until_removed, until_state


async def test_a_machine_is_removed_at_its_time(fake_host: AsyncHost, other: AsyncHost, clock: FakeClock) -> None:
    """Not before it, and the supervisor learns of a machine that another process makes."""
    async with supervised(fake_host, clock):
        oak = await boot(other, "oak", ttl_s=60)
        elm = await boot(other, "elm", ttl_s=600)
        await boot(other, "ash")
        assert oak.expires_at is not None
        assert 50 < oak.expires_at - time.time() <= 60
        clock.forward(30)
        clock.forward(40)
        await until_removed(other, "oak")
        assert [each.name for each in await other.call(LsRequest())] == ["elm", "ash"]
        clock.forward(600)
        await until_removed(other, "elm")
    assert elm.supervision == Supervision(expires_at=elm.expires_at)
    await other.call(RmRequest(instance="ash"))
    await assert_tidy(other)


async def test_a_changed_lifetime_counts(fake_host: AsyncHost, other: AsyncHost, clock: FakeClock) -> None:
    """A longer one, none, and one of a machine that had none."""
    async with supervised(fake_host, clock):
        for name in ("longer", "none"):
            await boot(other, name, ttl_s=60)
        await boot(other, "late")
        longer = await other.call(UpdateRequest(instance="longer", ttl_s=3600))
        none = await other.call(UpdateRequest(instance="none", ttl_s=0))
        late = await other.call(UpdateRequest(instance="late", expires_at=clock.now() + 90))
        assert none.supervision is None
        assert late.expires_at == pytest.approx(clock.now() + 90)
        clock.forward(100)
        await until_removed(other, "late")
        assert [each.name for each in await other.call(LsRequest())] == ["longer", "none"]
        clock.forward(3600)
        await until_removed(other, "longer")
        assert longer.expires_at is not None
        assert await exists(other, "none")


@pytest.mark.parametrize(
    ("how", "state", "expected"),
    [
        ("standby", State.RUNNING, State.STANDBY),
        ("stop", State.RUNNING, State.STOPPED),
        ("standby", State.STOPPED, State.STOPPED),
        ("stop", State.STANDBY, State.STANDBY),
    ],
)
async def test_a_machine_can_be_kept_at_rest(
    fake_host: AsyncHost, clock: FakeClock, how: str, state: State, expected: State
) -> None:
    """It is captured or stopped if it runs, and then has no lifetime any more: it can start again."""
    await make(fake_host, state, "oak", ttl_s=60, on_expiry=how)
    async with supervised(fake_host, clock):
        clock.forward(61)
        event = await event_of(fake_host, lambda event: event.kind == "policies")
        found = await until_state(fake_host, "oak", expected)
        assert (event.name, found.expires_at) == ("oak", None)
        if (how, expected) == ("stop", State.STOPPED):
            started = await fake_host.call(StartRequest(instance="oak", ttl_s=30))
            assert started.expires_at is not None
            clock.forward(60)
            await until_state(fake_host, "oak", State.STOPPED)


async def test_a_lifetime_outlives_the_supervisor(
    fake_host: AsyncHost, make_host: HostFactory, clock: FakeClock
) -> None:
    """The next supervisor removes the machine, also one whose time came while none was there."""
    async with make_host() as first, supervised(first, clock):
        for name, ttl_s in (("oak", 60), ("elm", 600)):
            await boot(first, name, ttl_s=ttl_s)
    clock.forward(100)
    async with supervised(fake_host, clock):
        await until_removed(fake_host, "oak")
        assert await exists(fake_host, "elm")
        clock.forward(600)
        await until_removed(fake_host, "elm")


async def test_the_next_command_takes_expired_machines(make_host: HostFactory, fake_host: AsyncHost) -> None:
    """Without a server. A machine that another process is changing is left to it."""
    oak, elm = await boot(fake_host, "oak", ttl_s=60), await boot(fake_host, "elm", ttl_s=60)
    await boot(fake_host, "ash", ttl_s=60)
    store = fake_host.local.rooms.store
    for each in (oak, elm):
        store.save(msgspec.structs.replace(each, supervision=Supervision(expires_at=time.time() - 1)))
    lock = locks.try_lock(fake_host.local.rooms.layout.lock(elm.id))
    assert lock is not None
    try:
        async with make_host() as host:
            assert [each.name for each in store.instances()] == ["elm", "ash"]
            locks.release(lock)
            with pytest.raises(Expired, match="elm"):
                await host.call(UpdateRequest(instance="elm", ttl_s=60))
    finally:
        locks.release(lock)
    async with make_host() as host:
        assert [each.name for each in await host.call(LsRequest())] == ["ash"]


async def test_one_process_supervises(
    make_host: HostFactory, fake_host: AsyncHost, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits, and takes over when the first has ended."""
    looked: list[LocalBackend] = []
    attend = Upkeep.attend

    async def noted(upkeep: Upkeep, key: str, now: float) -> Next:
        looked.append(upkeep._host)  # type: ignore[arg-type]
        return await attend(upkeep, key, now)

    monkeypatch.setattr(Upkeep, "attend", noted)
    async with make_host() as first, make_host() as second, AsyncExitStack() as until_first_ends:
        await until_first_ends.enter_async_context(supervised(first, clock))
        await boot(fake_host, "oak", ttl_s=60)
        clock.forward(61)
        await until_removed(fake_host, "oak")
        async with supervised(second, clock):
            await boot(fake_host, "elm", ttl_s=60)
            clock.forward(61)
            await until_removed(fake_host, "elm")
            assert set(looked) == {first.local}
            await until_first_ends.aclose()
            looked.clear()
            await boot(fake_host, "ash", ttl_s=60)
            clock.forward(61)
            await until_removed(fake_host, "ash")
            assert set(looked) == {second.local}


async def test_a_fork_has_its_own_lifetime(fake_host: AsyncHost) -> None:
    """Not that of its source; forks of snapshots too."""
    await boot(fake_host, "oak", ttl_s=600, on_expiry="stop")
    (plain,) = (await fake_host.call(ForkRequest(instance="oak", from_running=True))).instances
    assert plain.supervision is None
    (short,) = (await fake_host.call(ForkRequest(instance="oak", from_running=True, ttl_s=60))).instances
    assert short.expires_at is not None
    assert short.expires_at < time.time() + 61
    kept = await fake_host.call(SnapshotRequest(instance="oak", name="kept"))
    (grown,) = (await fake_host.call(SnapshotForkRequest(snapshot=kept.name, ttl_s=60, on_expiry="stop"))).instances
    assert grown.supervision is not None
    assert grown.supervision.on_expiry == "stop"


async def test_the_users_own_command_wins(fake_host: AsyncHost, clock: FakeClock) -> None:
    """A machine that is stopped, captured or removed before its time is not touched twice."""
    async with supervised(fake_host, clock):
        for name in ("oak", "elm", "ash"):
            await boot(fake_host, name, ttl_s=60, on_expiry="standby")
        await fake_host.call(StopRequest(instance="oak", grace_s=0))
        await fake_host.call(StandbyRequest(instance="elm"))
        await fake_host.call(RmRequest(instance="ash"))
        clock.forward(61)
        for name, state in (("oak", State.STOPPED), ("elm", State.STANDBY)):
            await event_of(fake_host, _policies_of(name))
            await until_state(fake_host, name, state)


def _policies_of(name: str) -> Callable[[Event], bool]:
    return lambda event: (event.kind, event.name) == ("policies", name)


def test_a_lifetime_is_checked() -> None:
    """One form of it, in range; a time in the future is checked when the request is carried out."""
    for wrong in ({"ttl_s": -1}, {"ttl_s": 1e12}, {"expires_at": -5}, {"ttl_s": 5, "expires_at": 5e9}):
        with pytest.raises(UsageError):
            UpdateRequest(instance="oak", **wrong)


async def test_a_time_in_the_past_is_refused(fake_host: AsyncHost) -> None:
    """And nothing is made."""
    with pytest.raises(UsageError, match="future"):
        await boot(fake_host, "oak", expires_at=time.time() - 1)
    assert await fake_host.call(LsRequest()) == []
