"""`POST /instances/{id}/forks` and `/snapshots/{id}/forks`, and what instances say about their forks."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest
from httpx_sse import aconnect_sse

from conftest import HostFactory
from coppice.model import State
from coppice.requests import SnapshotRequest
from coppice.server.auth import make_token
from fakes.hosting import make
from servers import KEY, client_of


@pytest.fixture
async def stump(make_host: HostFactory) -> None:
    """A template with a snapshot."""
    async with make_host() as local:
        await make(local, State.STANDBY, "stump")
        await local.call(SnapshotRequest(instance="stump", name="seed"))
        await (await local.get("stump")).promote()


@pytest.mark.usefixtures("stump")
@pytest.mark.parametrize("path", ["/instances/stump/forks", "/snapshots/seed/forks"])
async def test_many_forks_in_one_call(socket_address: str, path: str) -> None:
    """Each fork has its own result, with the times of its stages."""
    body: dict[str, Any] = {
        "count": 3,
        "names": ["a", "b", "c"],
        "payloads": [base64.b64encode(each).decode() for each in (b"1", b"2", b"3")],
        "tags": {"team": "x"},
        "atomic": True,
    }
    async with client_of(socket_address) as client:
        report = (await client.post(path, json=body)).raise_for_status().json()
        assert [each["name"] for each in report["results"]] == ["a", "b", "c"]
        for each in report["results"]:
            assert each["ok"]
            assert each["instance"]["state"] == "Running"
            assert {"place", "start", "ready"} <= each["stages"].keys()
        tagged = (await client.get("/instances", params={"tags[team]": "x"})).json()
        assert [each["name"] for each in tagged] == ["a", "b", "c"]
        source = (await client.get("/instances/stump")).json()
        assert (source["fork_count"], source["forks"]) == (3, ["a", "b", "c"])
        assert (source["memory"]["link_count"], source["memory"]["unique_bytes"]) == (5, 0)
        fork = (await client.get("/instances/a")).json()
        assert (fork["parent"], fork["fork_count"], fork["forks"]) == (source["id"], 0, [])
        listed = {each["name"]: each for each in (await client.get("/instances")).json()}
        assert (listed["stump"]["fork_count"], listed["a"]["fork_count"]) == (3, 0)


@pytest.mark.usefixtures("stump")
async def test_the_target_and_the_answer_are_chosen(socket_address: str) -> None:
    """Forks to Standby; the same key has one effect; events; an operation that can be looked up."""
    async with client_of(socket_address) as client:
        body: dict[str, Any] = {"count": 2, "target_state": "Standby"}
        first = await client.post("/instances/stump/forks", json=body, headers={"idempotency-key": "one"})
        again = await client.post("/instances/stump/forks", json=body, headers={"idempotency-key": "one"})
        assert first.json() == again.json()
        assert {each["instance"]["state"] for each in first.json()["results"]} == {"Standby"}
        async with aconnect_sse(client, "POST", "/instances/stump/forks", json={"names": ["d"]}) as source:
            assert [each.event async for each in source.aiter_sse()][-1] == "result"
        begun = await client.post("/instances/stump/forks", json={}, headers={"prefer": "respond-async"})
        assert begun.status_code == 202
        assert (await client.get(f"/operations/{begun.json()['id']}")).status_code == 200
        assert (await client.get("/instances/d")).json()["fork_count"] == 0


@pytest.mark.usefixtures("stump")
async def test_refusals(socket_address: str) -> None:
    """A wrong field, a wrong value and a source that does not exist are errors of the client."""
    async with client_of(socket_address) as client:
        for path, body, status in (
            ("/instances/stump/forks", {"cuont": 2}, 400),
            ("/instances/stump/forks", {"target_state": "Paused"}, 400),
            ("/instances/stump/forks", {"instance": "other"}, 400),
            ("/instances/nothing/forks", {}, 404),
            ("/snapshots/nothing/forks", {}, 404),
        ):
            answer = await client.post(path, json=body)
            assert (answer.status_code, answer.headers["x-should-retry"]) == (status, "false")


@pytest.mark.usefixtures("stump")
async def test_another_owner_finds_no_source(tcp_address: str) -> None:
    """A source of the operator does not exist for an owner."""
    token = make_token(KEY, owner="bob")
    async with httpx.AsyncClient(base_url=tcp_address, headers={"authorization": f"Bearer {token}"}) as client:
        assert (await client.post("/instances/stump/forks", json={})).status_code == 404
        assert (await client.post("/snapshots/seed/forks", json={})).status_code == 404
