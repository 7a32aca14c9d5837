"""Forks of a running machine: it is paused for a moment and runs on, the forks are of one instant,
and nothing else remains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.errors import CoppiceError, HostCannot, IllegalTransition, NameTaken, VmmDied, VmmError
from coppice.machine import capture, live
from coppice.memory.capture import PrivateCapture, Taken
from coppice.model import PAGE_SIZE, Sharing, State
from coppice.requests import (
    ForkRequest,
    GetRequest,
    InspectRequest,
    RestoreRequest,
    RmRequest,
    StandbyRequest,
    StartRequest,
    StopRequest,
)
from coppice.state.journal import JournalOperation
from coppice.state.store import Store
from fakes.driver import FakeDriver
from fakes.hosting import (
    ask,
    assert_tidy,
    boot,
    cancelled_at,
    fingerprint,
    make,
    make_threads_late,
    memory_of,
    snapshot,
)

_MOST_WAITS = 400


async def warm(host: AsyncHost, *, private: bool) -> None:
    """Make a Running machine that knows something, on a private mapping or in its first boot."""
    await boot(host)
    if private:
        await host.call(StandbyRequest(instance="oak"))
        await host.call(RestoreRequest(instance="oak"))
    await ask(host, "oak", "remember", "lesson", "learned")


@pytest.fixture(params=[False, True], ids=["first boot", "private mapping"])
def private(request: pytest.FixtureRequest) -> bool:
    """Both kinds of memory that a running source can have."""
    return bool(request.param)


async def test_the_source_runs_on_and_the_forks_know_what_it_knew(fake_host: AsyncHost, private: bool) -> None:
    """Each fork has the state at its own call and shares memory by hard link; later changes of the
    source stay in the source.
    """
    host = fake_host
    await warm(host, private=private)
    for number in (1, 2):
        await ask(host, "oak", "remember", "round", str(number))
        report = await host.call(
            ForkRequest(instance="oak", names=[f"elm-{number}", f"fir-{number}"], count=2, from_running=True)
        )
        assert report.succeeded == 2
        assert report.source_pause_ms is not None
        assert (await host.call(GetRequest(instance="oak"))).state is State.RUNNING
        await ask(host, "oak", "remember", "round", "later")
        first, second = report.instances
        assert memory_of(host, first).stat().st_ino == memory_of(host, second).stat().st_ino
        for fork in report.instances:
            assert (fork.parent_name, fork.state) == ("oak", State.RUNNING)
            assert await ask(host, fork, "hostname") == fork.name
            assert await ask(host, fork, "recall", "lesson") == "learned"
            assert await ask(host, fork, "recall", "round") == str(number)
        assert {result.sharing for result in report.results} == {Sharing.HARDLINK}
    await assert_tidy(host, "oak", "elm-1", "fir-1", "elm-2", "fir-2")
    assert (await host.call(InspectRequest(instance="oak"))).fork_count == 4


async def test_later_writes_of_the_source_never_reach_a_fork(fake_host: AsyncHost, private: bool) -> None:
    """The forks' mem-file is immutable from the fork on, although the source goes on writing."""
    await warm(fake_host, private=private)
    (elm,) = (
        await fake_host.call(ForkRequest(instance="oak", names=["elm"], target=State.STANDBY, from_running=True))
    ).instances
    before = fingerprint(memory_of(fake_host, elm))
    assert before[1] & 0o222 == 0
    await ask(fake_host, "oak", "dirty", "200")
    await ask(fake_host, "oak", "remember", "lesson", "revised")
    assert (await fake_host.stats())["oak"].unique_bytes >= 200 * PAGE_SIZE
    assert fingerprint(memory_of(fake_host, elm)) == before
    await fake_host.call(RestoreRequest(instance="elm"))
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"


async def test_a_disk_that_freezes_late_is_thawed(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest with much to write may freeze its disk after the deadline.

    Neither the source nor its forks stay frozen.
    """
    await warm(fake_host, private=True)
    monkeypatch.setattr(capture, "_FREEZE_DEADLINE_S", 0.2)
    freezing, pausing = driver.faults.hold_at("freeze"), driver.faults.hold_at("pause")
    forking = asyncio.create_task(fake_host.call(ForkRequest(instance="oak", names=["elm"], from_running=True)))
    async with asyncio.timeout(20):
        await pausing.reached.wait()
        monkeypatch.setattr(capture, "_FREEZE_DEADLINE_S", 10.0)
        freezing.release.set()
        source = fake_host.local.rooms.directory((await fake_host.call(GetRequest(instance="oak"))).id)
        while not driver.guest_state(source).frozen:  # noqa: ASYNC110 - a guest's memory has no event
            await asyncio.sleep(0.001)
        pausing.release.set()
        (elm,) = (await forking).instances
    assert not driver.guest_state(source).frozen
    assert not driver.guest_state(fake_host.local.rooms.directory(elm.id)).frozen


async def test_the_disk_of_the_source_thaws_before_its_memory_is_written(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing the memory may take seconds on a slow disk, and the running source's writes must not
    wait for it.
    """
    await warm(fake_host, private=True)
    source = fake_host.local.rooms.directory((await fake_host.call(GetRequest(instance="oak"))).id)
    finish, frozen = PrivateCapture.finish, list[bool]()

    def looked(capture: PrivateCapture) -> Taken:
        frozen.append(driver.guest_state(source).frozen)
        return finish(capture)

    monkeypatch.setattr(PrivateCapture, "finish", looked)
    await fake_host.call(ForkRequest(instance="oak", names=["elm"], from_running=True))
    assert frozen == [False]
    assert driver.faults.reached["freeze"] == 1


async def test_the_source_can_be_captured_and_stopped_afterwards(fake_host: AsyncHost, private: bool) -> None:
    """Standby, restore, stop and start work as ever: the memory is complete, although a part of it
    is private pages now.
    """
    await warm(fake_host, private=private)
    await fake_host.call(ForkRequest(instance="oak", names=["elm"], from_running=True))
    await ask(fake_host, "oak", "remember", "lesson", "revised")
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await ask(fake_host, "oak", "recall", "lesson") == "revised"
    await fake_host.call(StopRequest(instance="oak"))
    await fake_host.call(StartRequest(instance="oak"))
    await fake_host.call(RmRequest(instance="oak"))
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    await assert_tidy(fake_host, "elm")


@pytest.mark.parametrize("state", [state for state in State if state is not State.RUNNING])
async def test_only_a_running_machine_is_forked_from_running(fake_host: AsyncHost, state: State) -> None:
    """An instance in any other state is refused before it is touched."""
    await make(fake_host, state)
    before = snapshot(fake_host)
    with pytest.raises(IllegalTransition):
        await fake_host.call(ForkRequest(instance="oak", from_running=True))
    assert snapshot(fake_host) == before


async def test_a_taken_name_does_not_even_pause_the_source(fake_host: AsyncHost, driver: FakeDriver) -> None:
    """Names are taken before the source is paused."""
    await boot(fake_host)
    await boot(fake_host, "elm", start=False)
    before = snapshot(fake_host)
    with pytest.raises(NameTaken):
        await fake_host.call(ForkRequest(instance="oak", names=["elm"], from_running=True))
    assert snapshot(fake_host) == before
    assert driver.faults.reached["pause"] == 0


FAULTS: dict[str, tuple[Callable[[FakeDriver], None], type[CoppiceError], State]] = {
    "no pause": (lambda driver: driver.faults.fail_at("pause"), VmmError, State.RUNNING),
    "no devices": (lambda driver: driver.faults.fail_at("save"), VmmError, State.RUNNING),
    "no resume at first": (lambda driver: driver.faults.fail_at("resume"), VmmError, State.RUNNING),
    "death at the pause": (lambda driver: driver.faults.die_at("pause"), VmmDied, State.STOPPED),
    "death at the devices": (lambda driver: driver.faults.die_at("save"), VmmDied, State.STOPPED),
    "death at the resume": (lambda driver: driver.faults.die_at("resume"), VmmDied, State.STOPPED),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_capture_that_fails_leaves_the_source_running(
    fake_host: AsyncHost, driver: FakeDriver, private: bool, fault: str
) -> None:
    """The source keeps what it knew, and no fork or stem is left.

    If its VMM died, it is Stopped.
    """
    await warm(fake_host, private=private)
    plan, error, outcome = FAULTS[fault]
    plan(driver)
    with pytest.raises(error):
        await fake_host.call(ForkRequest(instance="oak", count=2, from_running=True))
    oak = await fake_host.call(GetRequest(instance="oak"))
    assert oak.state is outcome
    await assert_tidy(fake_host, "oak")
    if outcome is State.RUNNING:
        assert await ask(fake_host, "oak", "recall", "lesson") == "learned"
        assert (await fake_host.call(ForkRequest(instance="oak", count=2, from_running=True))).succeeded == 2
        await fake_host.call(StandbyRequest(instance="oak"))
        await fake_host.call(RestoreRequest(instance="oak"))
        assert await ask(fake_host, "oak", "recall", "lesson") == "learned"


async def test_forks_that_fail_do_not_touch_the_source(fake_host: AsyncHost, driver: FakeDriver, private: bool) -> None:
    """If all forks fail, with or without `atomic`, the source runs on and the stem is gone."""
    await warm(fake_host, private=private)
    for atomic in (False, True):
        driver.faults.fail_at("restore")
        driver.faults.fail_at("restore", nth=2)
        if atomic:
            with pytest.raises(VmmError):
                await fake_host.call(ForkRequest(instance="oak", count=2, from_running=True, atomic=True))
        else:
            assert (await fake_host.call(ForkRequest(instance="oak", count=2, from_running=True))).succeeded == 0
        await assert_tidy(fake_host, "oak")
        assert await ask(fake_host, "oak", "recall", "lesson") == "learned"


async def test_a_mapping_that_cannot_be_changed_is_copied(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If ptrace is forbidden, the memory is copied while the source is paused, and the
    log says so.
    """

    def forbidden(*_: object) -> int:
        raise HostCannot("ptrace is not permitted", hint="allow it")

    monkeypatch.setattr(live, "make_private", forbidden)
    await warm(fake_host, private=False)
    report = await fake_host.call(ForkRequest(instance="oak", names=["elm"], from_running=True))
    assert report.succeeded == 1
    logged = any("ptrace is not permitted" in record.getMessage() for record in caplog.records)
    assert logged == driver.capabilities.boots_in_file  # memory in no file is written by the VMM
    await ask(fake_host, "oak", "remember", "lesson", "revised")
    assert await ask(fake_host, "elm", "recall", "lesson") == "learned"
    await fake_host.call(StandbyRequest(instance="oak"))
    await assert_tidy(fake_host, "oak", "elm")


async def test_a_cancelled_fork_of_a_running_machine_leaves_it_running(
    fake_host: AsyncHost, driver: FakeDriver, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation at any wait leaves no fork, stem or partial capture.

    The guest answers, and its memory is complete.
    """
    await warm(fake_host, private=private)
    make_threads_late(monkeypatch)
    for nth in range(1, _MOST_WAITS):
        came = await cancelled_at(fake_host.call(ForkRequest(instance="oak", names=["elm"], from_running=True)), nth)
        if not came:
            break
        (oak,) = await assert_tidy(fake_host, "oak")
        assert oak.state is State.RUNNING
        assert not await driver.is_paused(fake_host.local.rooms.directory(oak.id))
        assert await ask(fake_host, "oak", "recall", "lesson") == "learned"
    else:
        pytest.fail("the fork waits more often than this test cancels")
    assert nth > 10
    await assert_tidy(fake_host, "oak", "elm")
    await fake_host.call(StandbyRequest(instance="oak"))
    await fake_host.call(RestoreRequest(instance="oak"))
    assert await ask(fake_host, "oak", "recall", "lesson") == "learned"


async def test_a_fork_from_running_whose_host_was_killed(
    fake_host: AsyncHost, make_host: HostFactory, driver: FakeDriver, dead_store: Store, private: bool
) -> None:
    """Recovery removes the stem and the children, and resumes the source with what it knew."""
    await warm(fake_host, private=private)
    oak = await fake_host.call(GetRequest(instance="oak"))
    stem = live.new_stem(oak)
    dead_store.create([stem], JournalOperation.FORK)
    fake_host.local.rooms.directory(stem.id).mkdir()
    dead_store.begin(oak, JournalOperation.FORK_RUNNING)
    await driver.pause(fake_host.local.rooms.directory(oak.id))
    await driver.save(fake_host.local.rooms.directory(oak.id))
    async with make_host() as next_host:
        await assert_tidy(next_host, "oak")
        async with asyncio.timeout(10):
            assert await ask(next_host, "oak", "recall", "lesson") == "learned"
