"""Every route, with the token of another owner: nothing is found, and nothing is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from coppice.client.connecting import connect_async
from coppice.requests import Request
from coppice.requests.base import fields_of
from coppice.server.auth import make_token
from coppice.server.table import CALLS
from fakes.records import MEMORY_BYTES, OVERLAY_BYTES
from fakes.rooms import IMAGE
from servers import KEY

TARGETS = {"instance": "oak", "snapshot": "seed", "volume": "store", "source": "oak"}
VALUES: dict[str, Any] = {
    "argv": ["true"],
    "path": "/tmp/x",
    "source_path": "/tmp/x",
    "command": "0" * 16,
    "state": "Running",
    "states": ["Running"],
    "data": "",
    "port": 80,
    "deadline_s": 1.0,
    "interval_s": 60.0,
    "max_count": 1,
}
PUBLIC = {"/health"}
LISTS = {"snapshot_ls"}  # with a filter; empty lists


@pytest.fixture
async def secrets_of_ann(tcp_address: str) -> AsyncIterator[list[str]]:
    """What bob must not learn: ids of ann's objects, and texts in them."""
    async with connect_async(tcp_address, token=make_token(KEY, owner=None)) as operator:
        await operator.images.tag(IMAGE, "shared", public=True)
    async with connect_async(tcp_address, token=make_token(KEY, owner="ann")) as host:
        machine = await host.run(
            "shared", name="oak", memory_bytes=MEMORY_BYTES, overlay_bytes=OVERLAY_BYTES, tags={"a": "told-by-none"}
        )
        saved = await machine.snapshot(name="seed")
        volume = await host.volumes.create("store", size_bytes=64 << 20)
        (fork,) = await machine.fork(1, names=["elm"], from_running=True)
        yield [machine.id, saved.id, volume.id, fork.id, "told-by-none"]


def body_for(kind: type[Request[Any]]) -> dict[str, Any]:
    """Return a valid body of an operation, about ann's objects if it has any target."""
    found: dict[str, Any] = {}
    for name in fields_of(kind):
        if name in TARGETS:
            found[name] = TARGETS[name]
        elif name == "max_count" or kind.__struct_fields__.index(name) < len(kind.__struct_fields__) - len(
            kind.__struct_defaults__
        ):
            found[name] = VALUES.get(name, "x")
    return found


async def test_no_operation_acts_on_another_owner_s_objects(tcp_address: str, secrets_of_ann: list[str]) -> None:
    """Each that names a target does not find it. No answer has an id or a text of another owner."""
    token = make_token(KEY, owner="bob")
    async with httpx.AsyncClient(base_url=tcp_address, headers={"authorization": f"Bearer {token}"}) as client:
        for name, kind in CALLS.items():
            body = body_for(kind)
            if name in ("doctor", "image_build", "image_pull", "kernel_fetch", "kernel_add", "image_import", "run"):
                continue  # they name nothing of an owner
            answer = await client.post(f"/call/{name}", json=body, timeout=60)
            assert not any(each in answer.text for each in secrets_of_ann), (name, answer.text)
            if body.keys() & TARGETS.keys() and name not in LISTS:
                assert answer.status_code in (403, 404), (name, body, answer.text)


async def test_no_path_leads_to_another_owner_s_objects(tcp_address: str, secrets_of_ann: list[str]) -> None:
    """Each route of the document, with ids and names of another owner in its path."""
    token = make_token(KEY, owner="bob")
    async with httpx.AsyncClient(base_url=tcp_address, headers={"authorization": f"Bearer {token}"}) as client:
        paths = (await client.get("/openapi/openapi.json")).json()["paths"]
        for path, methods in paths.items():
            if path.startswith("/call/") or path in PUBLIC:
                continue
            target = "seed" if path.startswith("/snapshots") else "store" if path.startswith("/volumes") else "oak"
            url = path.replace("{key}", target).replace("{snapshot}", "seed").replace("{volume}", "store")
            for method in methods:
                body = {"kind": "Standby", "name": "new", "target": "x", "image": "none"}
                params = {"state": "Running", "path": "/x", "follow": "false", "after": "0", "timeout": "1s"}
                sends: dict[str, Any] = {} if method in ("get", "delete") else {"json": body}
                async with client.stream(method.upper(), url, params=params, timeout=60, **sends) as answer:
                    text = (await answer.aread()).decode()
                    assert not any(each in text for each in secrets_of_ann), (method, path, text)
                    if "{" in path and "{name}" not in path:
                        assert answer.status_code in (400, 403, 404, 501), (method, path, text)
    async with connect_async(tcp_address, token=make_token(KEY, owner="ann")) as host:
        assert sorted(each.name for each in await host.ls()) == ["elm", "oak"]
        assert [each.name for each in await host.snapshots.ls()] == ["seed"]
        assert [each.name for each in await host.volumes.ls()] == ["store"]
