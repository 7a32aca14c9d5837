"""A fan-out as a stream: each fork is reported as soon as it is ready."""

from __future__ import annotations

import asyncio

import msgspec
from httpx_sse import aconnect_sse

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.model import ForkReport, Progress, State
from coppice.requests import ForkRequest
from fakes.driver import FakeDriver
from fakes.hosting import make
from servers import client_of


async def test_each_fork_is_reported_when_it_is_ready(
    any_host: AsyncHost, driver: FakeDriver, make_host: HostFactory
) -> None:
    """The result of a ready fork arrives while another has not answered. A failed one has its error."""
    async with make_host() as local:
        await make(local, State.TEMPLATE)
    gate = driver.faults.hold_at("restored", nth=2)
    driver.faults.fail_at("restored", nth=3)
    steps: asyncio.Queue[Progress] = asyncio.Queue()
    request = ForkRequest(instance="oak", count=4, names=["elm"])
    forking = asyncio.create_task(any_host.call(request, steps.put_nowait))
    async with asyncio.timeout(20):
        early = [await steps.get() for _ in range(3)]
    assert not forking.done()
    gate.release.set()
    report = await asyncio.wait_for(forking, 20)
    results = [step.fork for step in (*early, await asyncio.wait_for(steps.get(), 20))]
    assert sorted(each.name for each in results if each) == ["elm-1", "elm-2", "elm-3", "elm-4"]
    assert sorted(each.ok for each in results if each) == [False, True, True, True]
    assert {each.name: each for each in results if each} == {each.name: each for each in report.results}
    assert [step.done for step in early] == [1, 2, 3]


async def test_the_stream_of_a_fan_out(socket_address: str, make_host: HostFactory) -> None:
    """Server-sent events: one `progress` for each fork, at least, and the report at the end."""
    async with make_host() as local:
        await make(local, State.TEMPLATE)
    body = msgspec.json.encode(ForkRequest(instance="oak", count=5))
    async with (
        client_of(socket_address) as client,
        aconnect_sse(client, "POST", "/call/fork", content=body) as source,
    ):
        events = [event async for event in source.aiter_sse()]
        operation = source.response.headers["coppice-operation"]
        view = (await client.get(f"/operations/{operation}")).json()
    steps = [msgspec.json.decode(event.data, type=Progress) for event in events if event.event == "progress"]
    report = msgspec.json.decode(events[-1].data, type=ForkReport)
    assert sorted(step.fork.name for step in steps if step.fork) == sorted(each.name for each in report.results)
    assert all(step.fork.stages for step in steps if step.fork)
    assert view["progress"]["fork"] is None  # the result has the forks
