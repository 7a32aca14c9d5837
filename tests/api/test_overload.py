"""An overloaded server refuses requests so that clients send them again later."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from coppice.client.connecting import connect_async
from coppice.model import State
from coppice.requests import StartRequest
from coppice.server.auth import make_token
from coppice.server.running import Limits
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from fakes.hosting import make
from servers import KEY, client_of, fake_hosts, served


@pytest.mark.parametrize(
    ("limits", "status"),
    [(Limits(of_owner=1), 429), (Limits(of_all=1), 503)],
    ids=["of one owner", "of all owners"],
)
async def test_more_operations_than_the_limit_are_refused(
    fake_home: Path, driver: FakeDriver, tmp_path: Path, make_host: Any, limits: Limits, status: int
) -> None:
    """The answer says when to try again. The client of Coppice does so."""
    async with make_host() as local:
        for name in ("oak", "elm"):
            await make(local, State.STOPPED, name)
    gate = driver.faults.hold_at("booted")
    where = Listening(socket=tmp_path / "coppice.sock")
    async with (
        served(fake_hosts(fake_home, driver), where, None, limits=limits) as address,
        client_of(address) as client,
    ):
        first = asyncio.create_task(client.post("/call/start", json={"instance": "oak"}))
        await gate.reached.wait()
        refused = await client.post("/call/start", json={"instance": "elm"})
        assert refused.status_code == status
        assert int(refused.headers["retry-after"]) >= 1
        assert "x-should-retry" not in refused.headers
        assert (await client.post("/call/ls", json={})).status_code == 200  # reads are no operations
        async with connect_async(address) as host:
            second = asyncio.create_task(host.call(StartRequest(instance="elm")))
            await asyncio.sleep(0.2)
            assert not second.done()
            gate.release.set()
            assert (await asyncio.wait_for(second, 20)).state is State.RUNNING
        assert (await first).status_code == 200


async def test_each_owner_has_a_rate(fake_home: Path, driver: FakeDriver) -> None:
    """One owner's requests do not use up another's. The server's health can always be asked for."""
    async with (
        served(fake_hosts(fake_home, driver), Listening(port=0), KEY, per_minute=3) as address,
        httpx.AsyncClient(base_url=address) as client,
    ):
        tokens = {owner: {"authorization": f"Bearer {make_token(KEY, owner=owner)}"} for owner in ("ann", "bob")}
        statuses = [(await client.post("/call/ls", json={}, headers=tokens["ann"])).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        refused = await client.post("/call/ls", json={}, headers=tokens["ann"])
        assert refused.json()["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await client.post("/call/ls", json={}, headers=tokens["bob"])).status_code == 200
        assert (await client.get("/health", headers=tokens["ann"])).status_code == 200


async def test_a_huge_body_is_refused(socket_address: str) -> None:
    """The server reads no more of it than it accepts."""
    async with client_of(socket_address) as client:
        answer = await client.post("/call/write_file", content=b" " * ((64 << 20) + 1))
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
