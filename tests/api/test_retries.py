"""A request that a client repeats has one effect, and one result."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.model import State
from coppice.requests import ExecRequest, ForkRequest, RunRequest
from coppice.server import keys
from coppice.server.auth import make_token
from coppice.server.database import DATABASE, open_database
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from fakes.hosting import boot, make
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE
from servers import KEY, Servers, client_of, fake_hosts, served
from servers import SERVER_START_S as START_S

RUN: dict[str, Any] = {"image": IMAGE, "memory_bytes": MEMORY_BYTES, "overlay_bytes": OVERLAY_BYTES}


def keyed(key: str) -> dict[str, str]:
    """Return the header of a request with a key."""
    return {"idempotency-key": key}


async def test_a_repeated_request_gets_the_first_result(socket_address: str, make_host: HostFactory) -> None:
    """One machine is made, with one generated name, also if the repetition comes at the same time."""
    async with client_of(socket_address) as client:
        send = [client.post("/call/run", json=RUN, headers=keyed("one")) for _ in range(4)]
        answers = [*await asyncio.gather(*send), await client.post("/call/run", json=RUN, headers=keyed("one"))]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 1
        other = await client.post("/call/run", json=RUN, headers=keyed("two"))
        assert other.json()["id"] != answers[0].json()["id"]
    async with make_host() as host:
        assert len(await host.ls()) == 2


async def test_a_key_of_another_request_is_refused(socket_address: str) -> None:
    """The answer is 422, while the first request is under way as after it."""
    async with client_of(socket_address) as client:
        first = asyncio.create_task(client.post("/call/run", json=RUN | {"name": "oak"}, headers=keyed("one")))
        both = await asyncio.gather(first, client.post("/call/run", json=RUN | {"name": "elm"}, headers=keyed("one")))
        assert sorted(answer.status_code for answer in both) == [200, 422]
        again = await client.post("/call/rm", json={"instance": "oak"}, headers=keyed("one"))
        assert (again.status_code, again.json()["code"]) == (422, "idempotency_key_reused")
        assert again.headers["x-should-retry"] == "false"
        for wrong in ("", "x" * 256):
            assert (await client.post("/call/run", json=RUN, headers=keyed(wrong))).status_code == 400


async def test_a_final_error_is_repeated(socket_address: str) -> None:
    """An error that did not depend on the moment is the result of its request."""
    async with client_of(socket_address) as client:
        first = await client.post("/call/stop", json={"instance": "oak"}, headers=keyed("one"))
        await client.post("/call/run", json=RUN | {"name": "oak"})
        again = await client.post("/call/stop", json={"instance": "oak"}, headers=keyed("one"))
        assert first.status_code == again.status_code == 404
        assert first.json() == again.json()
        body = {"instance": "oak", "argv": ["no-such-program"]}
        refused, again = [await client.post("/call/exec", json=body, headers=keyed("two")) for _ in range(2)]
        assert refused.json() == again.json()
        assert refused.json()["errno"] == errno.ENOENT


async def test_a_key_belongs_to_an_owner(tcp_address: str, make_host: HostFactory) -> None:
    """Two owners may use the same key for different requests."""
    async with make_host() as local:
        await make(local, State.STOPPED)
    operator, ann = make_token(KEY, owner=None), make_token(KEY, owner="ann")
    async with httpx.AsyncClient(base_url=tcp_address, headers=keyed("one")) as client:
        for token, path, expected in ((operator, "/call/start", 200), (ann, "/call/stop", 404)):
            headers = {"authorization": f"Bearer {token}"}
            answer = await client.post(path, json={"instance": "oak"}, headers=headers)
            assert answer.status_code == expected


async def test_routes_of_hypeman_honour_keys(socket_address: str, make_host: HostFactory) -> None:
    """A key works for every POST, not only for those of Coppice's own API."""
    async with make_host() as local:
        await make(local, State.TEMPLATE)
    async with client_of(socket_address) as client:
        send = [client.post("/instances/oak/fork", json={"name": "elm"}, headers=keyed("one")) for _ in range(2)]
        answers = await asyncio.gather(*send)
        assert [answer.status_code for answer in answers] == [201, 201]
        assert answers[0].json()["id"] == answers[1].json()["id"]
        assert (await client.post("/instances/oak/fork", json={"name": "elm"})).status_code == 409


async def test_requests_are_recorded_by_their_digest(socket_address: str, fake_home: Path) -> None:
    """The database has no body of a request. A result is recorded whole: that of `run` has the
    instance's environment, as the records of the data directory have.
    """
    async with client_of(socket_address) as client:
        data = RUN | {"env": {"PASSWORD": "hunter2-of-the-test"}}
        assert (await client.post("/call/run", json=data | {"start": False}, headers=keyed("one"))).status_code == 200
        await client.post("/call/exec", json={"instance": "oak", "argv": ["hostname"]}, headers=keyed("two"))
    found = b"".join(path.read_bytes() for path in fake_home.glob("server.db*"))
    assert b"one" in found
    assert b"PASSWORD" in found  # of the result, which is the instance's record
    database = open_database(fake_home)
    store = keys.Keys(database)
    assert store.claim(None, "three", RunRequest(**data), {"name": "a-b"}).status == "new"
    database.close()


async def test_an_old_key_is_forgotten(fake_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a day the key can be used for another request."""
    database = open_database(fake_home)
    store = keys.Keys(database)
    assert store.claim(None, "one", RunRequest(**RUN), {}).status == "new"
    store.succeeded(None, "one", {"id": "x"})
    assert store.claim(None, "one", RunRequest(**RUN), {}).status == "succeeded"
    monkeypatch.setattr(keys, "KEPT_S", -1.0)
    assert store.claim(None, "one", RunRequest(**RUN, name="elm"), {}).status == "new"
    database.close()


async def test_a_result_that_is_too_large_is_not_kept(socket_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repetition says that the operation succeeded, and does not carry it out again."""
    monkeypatch.setattr(keys, "LARGEST_RESULT", 10)
    async with client_of(socket_address) as client:
        assert (await client.post("/call/run", json=RUN, headers=keyed("one"))).status_code == 200
        again = await client.post("/call/run", json=RUN, headers=keyed("one"))
        assert (again.status_code, again.json()["code"]) == (409, "outcome_unknown")


async def test_large_results_are_bounded_together(fake_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest large ones are dropped, and none of the small ones."""
    monkeypatch.setattr(keys, "MOST_BYTES", 300_000)
    database = open_database(fake_home)
    store = keys.Keys(database)
    for key in ("small", "a", "b", "c", "d"):
        assert store.claim(None, key, RunRequest(**RUN), {}).status == "new"
        store.succeeded(None, key, "x" * (100 if key == "small" else 100_000))
    found = {key: store.claim(None, key, RunRequest(**RUN), {}) for key in ("small", "a", "b", "c", "d")}
    assert [found[key].status for key in ("small", "a", "b", "c", "d")] == [
        "succeeded",
        "too-large",
        "too-large",
        "succeeded",
        "succeeded",
    ]
    assert found["a"].outcome is None
    database.close()


@pytest.mark.parametrize("target", [State.RUNNING, State.STANDBY])
@pytest.mark.parametrize("atomic", [False, True])
async def test_a_server_killed_in_mid_fan_out_loses_nothing(
    servers: Servers, make_host: HostFactory, atomic: bool, target: State
) -> None:
    """The client repeats its request at the next server, and gets the result with each fork once.
    Forks that were ready at the kill are kept, unless all or none were asked for.
    """
    async with make_host() as local:
        await make(local, State.TEMPLATE)
        address = await servers.start(hold=3 if target is State.RUNNING else 0)
        async with connect_async(address) as host:
            forking = asyncio.create_task(host.call(ForkRequest(instance="oak", count=5, atomic=atomic, target=target)))
            before = await _until_forked(local, 1 if atomic else 2)
            await servers.end(signal.SIGKILL)
            await servers.start()
            report = await asyncio.wait_for(forking, START_S)
        assert (report.count, report.succeeded) == (5, 5)
        forks = [vm.record for vm in await local.ls() if vm.record.parent_name == "oak"]
        assert sorted(vm.id for vm in forks) == sorted(vm.id for vm in report.instances)
        assert {vm.state for vm in forks} == {target}
        if not atomic:
            assert before <= {vm.id for vm in forks}


async def _until_forked(local: Any, count: int) -> set[str]:
    """Wait until so many forks are ready, and return their ids."""
    async with asyncio.timeout(START_S):
        while True:
            ready = {
                each.id
                for each in local.local.rooms.store.instances()
                if each.parent is not None and each.state in (State.RUNNING, State.STANDBY)
            }
            if len(ready) >= count:
                return ready
            await asyncio.sleep(0.01)


async def _until_recorded(home: Path) -> None:
    """Wait until a server has recorded a key."""
    async with asyncio.timeout(START_S):
        while True:
            with sqlite3.connect(home / DATABASE) as connection:
                if connection.execute("SELECT count(*) FROM keys").fetchone() != (0,):
                    return
            await asyncio.sleep(0.01)


async def test_a_command_of_a_killed_server_is_not_run_again(servers: Servers, make_host: HostFactory) -> None:
    """The client learns that the command may have run."""
    async with make_host() as local:
        await boot(local)
        address = await servers.start()
        body = msgspec.json.encode(ExecRequest(instance="oak", argv=["sleep"], timeout_s=60))
        async with client_of(address) as client:
            sending = asyncio.create_task(client.post("/call/exec", content=body, headers=keyed("one")))
            await _until_recorded(local.home)
            await servers.end(signal.SIGKILL)
            with contextlib.suppress(httpx.HTTPError):
                await sending
        await servers.start()
        async with client_of(address) as client:
            again = await client.post("/call/exec", content=body, headers=keyed("one"))
        assert (again.status_code, again.json()["code"]) == (409, "outcome_unknown")
        assert "may have run" in again.json()["message"]


async def test_a_client_repeats_a_request_at_a_restarted_server(
    fake_home: Path, driver: FakeDriver, tmp_path: Path
) -> None:
    """A request is sent again until the server listens again."""
    where = Listening(socket=tmp_path / "coppice.sock")
    async with served(fake_hosts(fake_home, driver), where, None) as address:
        host = connect_async(address)
        await host.open()
    running = asyncio.create_task(host.call(RunRequest(**RUN, name="oak")))
    await asyncio.sleep(0.05)
    assert not running.done()
    async with served(fake_hosts(fake_home, driver), where, None):
        assert (await asyncio.wait_for(running, START_S)).name == "oak"
        await host.close()
