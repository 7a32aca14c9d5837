"""Operations of a server: they can be watched and cancelled, and outlive their client."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import httpx
import pytest

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.client.remote import calls, patience
from coppice.errors import HostCannot, kinds
from coppice.model import ExecResult
from coppice.requests import ExecRequest, RunRequest, WaitProcessRequest
from coppice.server import running
from fakes.driver import FakeDriver
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE
from servers import client_of

RUN: dict[str, Any] = {"image": IMAGE, "name": "oak", "memory_bytes": MEMORY_BYTES, "overlay_bytes": OVERLAY_BYTES}


async def until_ended(client: httpx.AsyncClient, location: str) -> dict[str, object]:
    """Poll an operation until it has ended."""
    async with asyncio.timeout(20):
        while True:
            found: dict[str, object] = (await client.get(location)).json()
            if found["status"] != "running":
                return found
            await asyncio.sleep(0.02)


async def test_an_operation_can_be_started_and_looked_up(socket_address: str) -> None:
    """`Prefer: respond-async` answers at once with the place of the operation."""
    async with client_of(socket_address) as client:
        answer = await client.post("/call/run", json=RUN, headers={"prefer": "respond-async"})
        assert answer.status_code == 202
        assert answer.json()["status"] == "running"
        ended = await until_ended(client, answer.headers["location"])
        assert ended["status"] == "succeeded"
        assert isinstance(ended["result"], dict)
        assert ended["result"]["name"] == "oak"
        listed = (await client.get("/operations")).json()
        assert [(each["operation"], each["result"]) for each in listed] == [("run", None)]


async def test_a_lost_connection_does_not_end_the_operation(
    socket_address: str, driver: FakeDriver, make_host: HostFactory
) -> None:
    """The machine is made, although the client that asked for it is gone."""
    gate = driver.faults.hold_at("booted")
    async with client_of(socket_address) as client:
        asking = asyncio.create_task(client.post("/call/run", json=RUN))
        await gate.reached.wait()
        asking.cancel()
        await asyncio.wait({asking})
    gate.release.set()
    async with client_of(socket_address) as client:
        (running,) = (await client.get("/operations")).json()
        assert (await until_ended(client, f"/operations/{running['id']}"))["status"] == "succeeded"
    async with make_host() as host:
        assert [vm.name for vm in await host.ls()] == ["oak"]


async def test_a_cancelled_call_is_cancelled_on_the_server(
    socket_address: str, driver: FakeDriver, make_host: HostFactory
) -> None:
    """The client waits for the cleanup, and nothing is left of the machine."""
    gate = driver.faults.hold_at("booted")
    async with connect_async(socket_address) as host:
        running = asyncio.create_task(host.call(RunRequest(**RUN)))
        await gate.reached.wait()
        running.cancel()
        await asyncio.wait({running})
    assert running.cancelled()
    async with make_host() as local:
        assert await local.ls() == []


async def test_a_server_that_does_not_answer_is_named() -> None:
    """The error names the address, and the hint how to start a server."""
    with pytest.raises(HostCannot, match=r"/nowhere\.sock does not answer") as caught:
        async with connect_async("unix:/nowhere.sock"):
            pass
    assert caught.value.hint == "start it with `coppice serve`"


async def test_the_document_lists_the_statuses_of_errors(socket_address: str) -> None:
    """A generated client knows every error that a route can answer with."""
    async with client_of(socket_address) as client:
        document = (await client.get("/openapi/openapi.json")).json()
    statuses = {str(kind.http_status) for kind in kinds()}
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert statuses <= route["responses"].keys(), (method, path)
    assert "202" in document["paths"]["/call/run"]["post"]["responses"]


async def test_operations_share_one_connection(socket_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection for each would cost more than the request."""
    opened = 0
    connect = anyio.connect_unix

    async def counted(path: str) -> object:
        nonlocal opened
        opened += 1
        return await connect(path)

    monkeypatch.setattr(anyio, "connect_unix", counted)
    async with connect_async(socket_address) as host:
        for name in ("sap", "resin", "bark"):
            await host.volumes.create(name, size_bytes=32 << 20)
        assert len(await host.volumes.ls()) == 3
    assert opened == 1


async def test_a_client_waits_in_many_calls_at_once(socket_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that last do not hold up further ones: none waits for a connection of the others."""
    monkeypatch.setattr(calls, "_TIMEOUTS", httpx.Timeout(10.0, read=60.0, pool=1.0))
    monkeypatch.setattr(patience, "PERSIST_S", 1.0)
    async with connect_async(socket_address) as host, client_of(socket_address) as other, asyncio.timeout(60):
        vm = await host.call(RunRequest(**RUN))
        waits = [asyncio.create_task(host.call(WaitProcessRequest(instance=vm.id))) for _ in range(150)]
        while [each["status"] for each in (await other.get("/operations")).json()].count("running") < len(waits):
            assert not [each for each in waits if each.done()]
        await host.call(ExecRequest(instance=vm.id, argv=("remember", "exited", "3")))
        assert {each.process_end.exit_code for each in await asyncio.gather(*waits) if each.process_end} == {3}


async def test_the_results_of_ended_operations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten beyond a number of bytes. Who waits for one has it all the same."""
    monkeypatch.setattr(running, "MOST_BYTES", 1 << 20)
    operations = running.Operations(running.Limits())

    async def work(_: object) -> ExecResult:
        return ExecResult(exit_code=0, stdout=bytes(300_000))

    made = [operations.start("exec", None, work) for _ in range(10)]
    assert [len((await each.result()).stdout) for each in made] == [300_000] * 10
    await asyncio.sleep(0)  # the callbacks of the last one
    assert [each.id for each in operations.all(None)] == [each.id for each in made[-3:]]
    monkeypatch.setattr(running, "KEPT_S", -1.0)
    assert operations.all(None) == []
    small = operations.start("exec", None, work)
    assert (await small.result()).exit_code == 0
