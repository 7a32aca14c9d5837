"""Several processes do generated histories to one source at once: what each is told is explained by some order of one after the other.

Between processes, and not only between hosts of one: SQLite and flock know the difference.
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

from coppice.host import AsyncHost
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy
from fakes.rooms import DEADLINES, open_rooms, plant
from histories import FORKS, SOURCE, Call, Done, World, explained, told
from history_pool import Processes

PROCESSES = 3


@pytest.fixture(scope="module")
def processes(fake_vmm: Path) -> Iterator[Processes]:
    """They live as long as this module."""
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
    """No outcome is impossible, nobody waits for ever, and what is left at the end is whole and is what that order leaves."""
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
    """What is there when all is done; it is tidy, and is removed."""
    driver = FakeDriver(fake_vmm)
    async with AsyncHost(home, driver=driver, deadlines=DEADLINES, open_rooms=open_rooms) as host:
        found = {vm.name: vm for vm in await host.ls()}
        await assert_tidy(host, *found)
        last = World(
            source=found[SOURCE].state.value if SOURCE in found else None, forks=frozenset(found.keys() - {SOURCE})
        )
        for vm in reversed(await host.ls()):
            await host.rm(vm)
        await assert_tidy(host)
    return last


def done(what: str, outcome: str, begin: float, end: float, name: str = SOURCE) -> Done:
    """One operation with its times."""
    return Done(call=Call(what=what, name=name), outcome=outcome, begin=begin, end=end)


@pytest.mark.parametrize(
    ("first", "processes_did", "last", "possible"),
    [
        # Two demotions at once of a template that is forked between: one order has the fork last.
        ("Template", [[done("demote", "ok", 0, 3)], [done("fork", "ok", 1, 2, "elm")]], World(source="Standby", forks=frozenset({"elm"})), True),
        # The fork had ended before the demotion began: it must have been refused.
        ("Template", [[done("demote", "ok", 3, 4)], [done("fork", "ok", 1, 2, "elm")]], World(source="Standby", forks=frozenset({"elm"})), False),
        # Both cannot have removed it.
        ("Standby", [[done("rm", "ok", 0, 1)], [done("rm", "ok", 0, 1)]], World(source=None), False),
        # A capture that was lost.
        ("Running", [[done("standby", "ok", 0, 1), done("get", "Running", 2, 3)]], World(source="Standby"), False),
        ("Running", [[done("standby", "ok", 0, 1)], [done("get", "Running", 0, 1)]], World(source="Standby"), True),
        # What is there at the end counts too.
        ("Standby", [[done("fork", "ok", 0, 1, "elm")]], World(source="Standby"), False),
    ],
)  # fmt: skip
def test_the_judge_can_tell(first: str, processes_did: list[list[Done]], last: World, possible: bool) -> None:
    """A judge that explains everything would prove nothing."""
    assert explained(World(source=first), processes_did, last) is possible
