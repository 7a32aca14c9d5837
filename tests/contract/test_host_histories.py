"""Several processes run generated histories on one source at once; some serial order must explain
all outcomes.

The hosts are in separate processes, because SQLite and flock treat one process differently.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coppice.client import AsyncHost
from coppice.requests import LsRequest, RmRequest
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy
from fakes.rooms import DEADLINES, open_rooms, plant
from histories import FORKS, SOURCE, Call, Done, World, explained, told
from history_pool import Processes

PROCESSES = 3


@pytest.fixture(scope="module")
def processes(fake_vmm: Path, personality: str) -> Iterator[Processes]:
    """A pool of processes that lives as long as this module."""
    with Processes(PROCESSES, fake_vmm=fake_vmm) as pool:
        yield pool


CHANGES = ("promote", "demote", "standby", "restore", "stop", "start", "get")
CALLS = st.one_of(
    st.sampled_from([Call(what=what) for what in (*CHANGES, "promote", "demote")]),
    st.sampled_from([Call(what=what, name=name) for what in ("fork", "fork", "rm") for name in FORKS]),
    st.sampled_from([Call(what="rm"), *(Call(what=what) for what in CHANGES)]),
)
HISTORIES = st.lists(st.lists(CALLS, min_size=3, max_size=8), min_size=PROCESSES, max_size=PROCESSES)


@pytest.mark.timeout(300)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(histories=HISTORIES, state=st.sampled_from(["Standby", "Template", "Running", "Stopped"]))
def test_every_history_is_explained_by_some_order(
    processes: Processes, seed_home: Path, fake_vmm: Path, histories: list[list[Call]], state: str
) -> None:
    """No outcome is impossible, no call waits for ever, and the instances that are left are whole
    and match that order.
    """
    directory = Path(tempfile.mkdtemp(prefix="history-", dir=seed_home.parent))
    home = directory / "home"
    plant(seed_home, home)
    try:
        done = processes.run(home, histories, state=state)
        last = asyncio.run(settled(home, fake_vmm))
        assert explained(World(source=state), done, last), f"from {state} to {last}\n{told(done)}"
    finally:
        shutil.rmtree(directory)


async def settled(home: Path, fake_vmm: Path) -> World:
    """Return the state that the histories left, check that it is tidy, and remove everything."""
    driver = FakeDriver(fake_vmm)
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms) as host:
        found = {vm.name: vm for vm in await host.call(LsRequest())}
        await assert_tidy(host, *found)
        last = World(
            source=found[SOURCE].state.value if SOURCE in found else None, forks=frozenset(found.keys() - {SOURCE})
        )
        for vm in reversed(await host.call(LsRequest())):
            await host.call(RmRequest(instance=vm.id))
        await assert_tidy(host)
    return last


def done(what: str, outcome: str, begin: float, end: float, name: str = SOURCE) -> Done:
    """Return one operation with its outcome and its times."""
    return Done(call=Call(what=what, name=name), outcome=outcome, begin=begin, end=end)


@pytest.mark.parametrize(
    ("first", "processes_did", "last", "possible"),
    [
        # A demotion overlaps a fork: one order has the fork last.
        ("Template", [[done("demote", "ok", 0, 3)], [done("fork", "ok", 1, 2, "elm")]], World(source="Standby", forks=frozenset({"elm"})), True),
        # The fork had ended before the demotion began, so the demotion must be refused.
        ("Template", [[done("demote", "ok", 3, 4)], [done("fork", "ok", 1, 2, "elm")]], World(source="Standby", forks=frozenset({"elm"})), False),
        # Two removals of one instance cannot both succeed.
        ("Standby", [[done("rm", "ok", 0, 1)], [done("rm", "ok", 0, 1)]], World(source=None), False),
        # The instance runs after a standby that succeeded: the capture was lost.
        ("Running", [[done("standby", "ok", 0, 1), done("get", "Running", 2, 3)]], World(source="Standby"), False),
        ("Running", [[done("standby", "ok", 0, 1)], [done("get", "Running", 0, 1)]], World(source="Standby"), True),
        # The final state counts too: the fork is missing.
        ("Standby", [[done("fork", "ok", 0, 1, "elm")]], World(source="Standby"), False),
    ],
)  # fmt: skip
def test_the_judge_rejects_impossible_histories(
    first: str, processes_did: list[list[Done]], last: World, possible: bool
) -> None:
    """A judge that explains every history would prove nothing."""
    assert explained(World(source=first), processes_did, last) is possible
