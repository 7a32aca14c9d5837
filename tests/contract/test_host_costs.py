"""The work of the host for one operation, in counts that do not depend on the speed of this machine.

Each thread hop, turn of the event loop and transaction costs CPU time, and a host makes hundreds of
forks a second. A count that grows is a regression, whatever a clock says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from coppice import completion
from coppice.client import AsyncHost
from coppice.errors import CoppiceError
from coppice.model import State
from coppice.names import new_id
from coppice.requests import ExecRequest, ForkRequest, LsRequest, RmRequest, StopRequest
from coppice.state.journal import JournalOperation
from coppice.vmm import starting
from fakes.driver import FakeDriver
from fakes.hosting import assert_tidy, boot, make


class Costs(NamedTuple):
    """What one operation took."""

    hops: int  # calls in threads
    turns: int  # of the event loop
    statements: int  # of SQL


Counting = Callable[[AsyncHost, Callable[[], Awaitable[object]]], Awaitable[Costs]]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Count the work of one operation. Waits for a guest add turns, so tests leave room for them."""
    counts = {"hops": 0, "turns": 0, "statements": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for module in (completion, starting):
        monkeypatch.setattr(module, "submit", counted("hops", module.submit))
    monkeypatch.setattr(asyncio, "to_thread", counted("hops", asyncio.to_thread))
    turn = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]
    monkeypatch.setattr(asyncio.BaseEventLoop, "_run_once", counted("turns", turn))

    async def count(host: AsyncHost, work: Callable[[], Awaitable[object]]) -> Costs:
        connection = host.local.rooms.store._db._connection
        connection.set_trace_callback(lambda _: counts.update(statements=counts["statements"] + 1))
        before = dict(counts)
        await work()
        connection.set_trace_callback(None)
        return Costs(**{name: counts[name] - before[name] for name in counts})

    return count


def _fork(host: AsyncHost, name: str, **options: Any) -> Callable[[], Awaitable[object]]:
    return lambda: host.call(ForkRequest(instance="oak", names=(name,), atomic=True, **options))


async def _costs(host: AsyncHost, count: Counting, name: str) -> dict[str, Costs]:
    return {
        "fork": await count(host, _fork(host, name)),
        "exec": await count(host, lambda: host.call(ExecRequest(instance=name, argv=("recall", "x")))),
        "exec again": await count(host, lambda: host.call(ExecRequest(instance=name, argv=("recall", "x")))),
        "rm": await count(host, lambda: host.call(RmRequest(instance=name))),
    }


async def test_an_operation_takes_few_hops_turns_and_statements(fake_host: AsyncHost, counting: Counting) -> None:
    """A fork, a command and a removal, after a first round that imports their modules."""
    await make(fake_host, State.TEMPLATE)
    await _costs(fake_host, counting, "elm")
    costs = await _costs(fake_host, counting, "fir")
    assert costs["fork"].hops <= 7  # the fakes themselves use up to three
    assert costs["exec"].hops <= 1
    assert costs["rm"].hops <= 2
    assert costs["fork"].turns <= 45
    assert costs["exec"].turns <= 25
    assert costs["rm"].turns <= 25
    assert costs["fork"].statements <= 38  # with the triggers of events and of the load
    assert costs["exec"].statements <= 1
    assert costs["exec again"].hops == 0
    assert costs["exec again"].statements <= 1
    assert costs["rm"].statements <= 25  # each trigger counts as one


async def test_the_costs_do_not_grow_with_the_number_of_instances(fake_host: AsyncHost, counting: Counting) -> None:
    """A thousand stopped machines change nothing for another one."""
    oak = await make(fake_host, State.TEMPLATE)
    await _costs(fake_host, counting, "elm")
    alone = await _costs(fake_host, counting, "fir")
    others = [
        msgspec.structs.replace(oak, id=new_id(), name=f"other-{number}", state=State.STOPPED, capture=None)
        for number in range(1000)
    ]
    store = fake_host.local.rooms.store
    store.finish(store.create(others, JournalOperation.RUN), JournalOperation.RUN)
    among = await _costs(fake_host, counting, "ash")
    for name, costs in alone.items():
        assert among[name].hops == costs.hops
        assert among[name].statements == costs.statements


async def test_a_list_of_many_takes_one_hop_for_all(fake_host: AsyncHost, counting: Counting) -> None:
    """Listing takes the same statements and hops for one machine and for a hundred."""
    oak = await boot(fake_host, start=False)
    await fake_host.call(LsRequest())
    store = fake_host.local.rooms.store
    store.save(oak)  # the list is read again only after a write
    one = await counting(fake_host, lambda: fake_host.call(LsRequest()))
    others = [msgspec.structs.replace(oak, id=new_id(), name=f"other-{number}") for number in range(100)]
    store.finish(store.create(others, JournalOperation.RUN), JournalOperation.RUN)
    many = await counting(fake_host, lambda: fake_host.call(LsRequest()))
    assert (many.hops, many.statements) == (one.hops, one.statements)


async def test_a_removal_looks_for_unrecorded_processes_only_after_a_failure(
    fake_host: AsyncHost, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search reads links of every process of the host. The record of a machine whose operations
    have all ended names its VMM.
    """
    searches: list[Path] = []
    find = driver.find_orphans

    def found(instances: Path) -> Any:
        searches.append(instances)
        return find(instances)

    monkeypatch.setattr(driver, "find_orphans", found)
    await boot(fake_host)
    await fake_host.call(RmRequest(instance="oak"))
    assert searches == []
    await boot(fake_host, "elm")

    async def stuck(*_: object) -> None:
        raise CoppiceError("the VMM is stuck", hint="wait")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "quit", stuck)
        with pytest.raises(CoppiceError, match="stuck"):
            await fake_host.call(StopRequest(instance="elm", grace_s=0))
    assert searches == []
    await fake_host.call(RmRequest(instance="elm"))
    assert searches != []
    await assert_tidy(fake_host)
