"""The audit log: who did what. It has no secrets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from conftest import HostFactory
from coppice.server import audit
from coppice.server.auth import make_token
from coppice.server.database import DATABASE
from coppice.server.serving import Listening
from fakes.driver import FakeDriver
from fakes.hosting import boot
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE
from servers import KEY, fake_hosts, served

SECRET = "swordfish"  # noqa: S105 - of nothing
ENCODED = base64.b64encode(SECRET.encode()).decode()
SMALL = {"image": IMAGE, "memory_bytes": MEMORY_BYTES, "overlay_bytes": OVERLAY_BYTES}


def bearer(owner: str | None, *scopes: str) -> dict[str, str]:
    """Return the header of a token."""
    return {"authorization": f"Bearer {make_token(KEY, owner=owner, scopes=scopes)}"}


async def entries(client: httpx.AsyncClient, owner: str | None = None) -> list[dict[str, Any]]:
    """Return the audit log as an owner sees it, oldest first."""
    answer = await client.get("/audit", headers=bearer(owner))
    assert answer.status_code == 200, answer.text
    return list(reversed(answer.json()["entries"]))


async def test_each_change_is_recorded_with_its_caller(tcp_address: str) -> None:
    """Operator, owner, target, outcome, time and request id. Reading is not recorded."""
    async with httpx.AsyncClient(base_url=tcp_address) as client:
        sap = {"name": "sap", "size_bytes": 32 << 20}
        made = await client.post("/call/volume_create", json=sap, headers=bearer("ann"))
        assert made.status_code == 200, made.text
        headers = {**bearer("ann"), "x-request-id": "mine-1"}
        again = await client.post("/call/volume_create", json=sap, headers=headers)
        assert (again.status_code, again.headers["x-request-id"]) == (409, "mine-1")
        assert (await client.post("/call/volume_ls", json={}, headers=bearer(None))).status_code == 200
        assert (await client.delete("/volumes/sap", headers=bearer(None))).status_code == 204
        found = await entries(client)
        assert [(e["subject"], e["owner"], e["operation"], e["target"], e["outcome"]) for e in found] == [
            ("ann", "ann", "volume_create", "sap", "succeeded"),
            ("ann", "ann", "volume_create", "sap", "name_conflict"),
            (None, None, "volume_rm", "sap", "succeeded"),
        ]
        assert [found[0]["request_id"], found[1]["request_id"]] == [made.headers["x-request-id"], "mine-1"]
        assert {e["client"] for e in found} == {"127.0.0.1"}
        assert all(e["seconds"] >= 0 and e["at"] > 1e9 for e in found)
        assert await entries(client, "bob") == []
        assert len(await entries(client, "ann")) == 2


async def test_a_refused_caller_is_recorded(tcp_address: str) -> None:
    """A token that lacks the scope is known. A request without a valid token is not, since strangers
    could then fill the log.
    """
    async with httpx.AsyncClient(base_url=tcp_address) as client:
        refused = await client.post("/call/rm", json={"instance": "oak"}, headers=bearer("ann", "instance:read"))
        assert refused.status_code == 403
        assert (await client.post("/call/rm", json={"instance": "oak"})).status_code == 401
        (entry,) = await entries(client)
        assert (entry["subject"], entry["operation"], entry["outcome"]) == ("ann", "POST /call/rm", "forbidden")


async def test_a_command_over_a_websocket_is_recorded(tcp_address: str, make_host: HostFactory) -> None:
    """It is recorded when it begins, so a log is complete while sessions are open."""
    async with make_host() as local:
        oak = await boot(local)
    url = tcp_address.replace("http", "ws") + "/instances/oak/exec"
    async with (
        httpx.AsyncClient(base_url=tcp_address) as client,
        connect(url, additional_headers=bearer(None)) as socket,
    ):
        await socket.send('{"command": ["cat"]}')
        await socket.send(SECRET.encode())
        assert await socket.recv() == SECRET.encode()
        (entry,) = await entries(client)
        assert (entry["operation"], entry["target"], entry["outcome"]) == ("open_exec", oak.id, "begun")
        await socket.close()
        async with asyncio.timeout(20):
            while (await entries(client))[0]["outcome"] == "begun":
                pass
        (entry,) = await entries(client)
        assert entry["seconds"] > 0


async def test_no_secret_is_recorded(
    tcp_address: str, fake_home: Path, make_host: HostFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a payload, an environment, an argument, an input, content of a file, a login or a token."""
    async with make_host() as local:
        await boot(local)
    token = bearer(None)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/call/run", {**SMALL, "env": {"PASSWORD": SECRET}, "command": ["serve", SECRET]}),
        ("/call/exec", {"instance": "oak", "argv": ["hostname", SECRET], "env": {"P": SECRET}, "stdin": ENCODED}),
        ("/call/write_file", {"instance": "oak", "path": "/etc/password", "data": ENCODED}),
        ("/call/fork", {"instance": "oak", "from_running": True, "payloads": [ENCODED]}),
        ("/call/image_pull", {"reference": "127.0.0.1:1/private", "credentials": f"ann:{SECRET}"}),
        ("/images", {"name": "127.0.0.1:1/other", "credentials": {"username": "ann", "password": SECRET}}),
        ("/instances", {"name": "elm", "image": "tiny", "env": {"PASSWORD": SECRET}}),
    ]
    async with httpx.AsyncClient(base_url=tcp_address, timeout=60) as client:
        for path, body in requests:
            await client.post(path, json=body, headers={**token, "idempotency-key": path})
        found = await entries(client)
    assert {"run", "exec", "write_file", "fork", "image_pull"} <= {each["operation"] for each in found}
    with contextlib.closing(sqlite3.connect(fake_home / DATABASE)) as connection:
        recorded = repr(connection.execute("SELECT * FROM audit").fetchall())
    for secret in (SECRET, ENCODED, token["authorization"].split()[1]):
        assert secret not in recorded
        assert secret not in caplog.text


async def test_the_log_is_bounded_and_survives_the_server(
    fake_home: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest entries are removed."""
    monkeypatch.setattr(audit, "MOST_ENTRIES", 5)
    async with (
        served(fake_hosts(fake_home, driver), Listening(port=0), KEY) as address,
        httpx.AsyncClient(base_url=address) as client,
    ):
        for number in range(8):
            await client.post("/call/rm", json={"instance": f"m{number}"}, headers=bearer(None))
            await entries(client)
    async with (
        served(fake_hosts(fake_home, driver), Listening(port=0), KEY) as address,
        httpx.AsyncClient(base_url=address) as client,
    ):
        assert [each["target"] for each in await entries(client)] == [f"m{number}" for number in range(3, 8)]
