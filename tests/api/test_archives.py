"""Archives over plain HTTP: exported, imported, refused, given up, and kept apart by owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from coppice.client.connecting import connect_async
from coppice.errors import NotFound
from coppice.model import State
from coppice.requests import OpenExportRequest, OpenImportRequest
from coppice.server.auth import make_token
from servers import KEY, client_of
from template_archives import template

_TAR = {"content-type": "application/x-tar"}


async def test_a_template_is_exported_and_imported_by_plain_requests(socket_address: str) -> None:
    """Both bodies are streams. A refusal has the usual form."""
    async with connect_async(socket_address) as host, client_of(socket_address) as client:
        await template(host)
        exported = await client.get("/instances/oak/export")
        assert (exported.status_code, exported.headers["content-type"]) == (200, "application/x-tar")
        assert exported.content.startswith(b"coppice-template.json\0")
        made = await client.post("/templates/import", params={"name": "elm"}, content=exported.content, headers=_TAR)
        assert made.status_code == 201, made.text
        assert (made.json()["name"], made.json()["state"]) == ("elm", "Template")
        async with (await host.get("elm")).fork(1, atomic=True) as (fork,):
            assert (await fork.exec(["recall", "own"])).stdout == b"rings\n"
        again = await client.post("/templates/import", params={"name": "elm"}, content=exported.content, headers=_TAR)
        assert (again.status_code, again.json()["code"]) == (409, "name_conflict")
        part = await client.post("/templates/import?name=fir", content=exported.content[:-4096], headers=_TAR)
        assert (part.status_code, part.headers["x-should-retry"]) == (422, "false")
        assert "truncated" in part.json()["message"]
        async with (await host.get("elm")).fork(1, names=["ash"], atomic=True):
            running = await client.get("/instances/ash/export")
            assert (running.status_code, running.json()["code"]) == (409, "invalid_state")
        assert (await client.get("/instances/fir/export")).status_code == 404


async def test_a_client_that_goes_away_frees_the_template(socket_address: str) -> None:
    """The rest of the archive is not read, and the template can be removed."""
    async with connect_async(socket_address) as host, client_of(socket_address) as client:
        await template(host)
        async with client.stream("GET", "/instances/oak/export") as response:
            assert await anext(response.aiter_raw())
        await (await host.get("oak")).rm()
        assert await host.ls() == []


async def test_an_import_belongs_to_its_owner(tcp_address: str) -> None:
    """No owner can export another's template, and what one imports the others do not see."""
    ann, bob = (connect_async(tcp_address, token=make_token(KEY, owner=each)) for each in ("ann", "bob"))
    async with connect_async(tcp_address, token=make_token(KEY, owner=None)) as operator, ann, bob:
        await operator.images.tag("tiny", "tiny", public=True)
        await template(ann)
        async with ann.stream(OpenExportRequest(instance="oak")) as session:
            archive = b"".join([piece async for piece in session])
        with pytest.raises(NotFound):
            async with bob.stream(OpenExportRequest(instance="oak")):
                pass

        async def content() -> AsyncIterator[bytes]:
            yield archive

        async with bob.stream(OpenImportRequest(name="elm")) as importing:
            made = await importing.receive(content())
        assert (made.owner, made.state) == ("bob", State.TEMPLATE)
        with pytest.raises(NotFound):
            await ann.get("elm")


async def test_an_import_is_sent_again(socket_address: str) -> None:
    """The same key gets the first result. An archive that broke off is not remembered."""
    headers = _TAR | {"idempotency-key": "one"}
    async with connect_async(socket_address) as host, client_of(socket_address) as client:
        await template(host)
        archive = (await client.get("/instances/oak/export")).content

        async def part() -> AsyncIterator[bytes]:
            yield archive[: len(archive) // 2]
            raise ConnectionError("the client's network is gone")

        with pytest.raises(ConnectionError):
            await client.post("/templates/import?name=elm", content=part(), headers=headers)
        async with asyncio.timeout(20):
            while (made := await client.post("/templates/import?name=elm", content=archive, headers=headers)).is_error:
                assert (made.status_code, made.json()["code"]) == (409, "busy")  # the first one is still being undone
        again = await client.post("/templates/import?name=elm", content=archive, headers=headers)
        assert (again.status_code, again.json()["id"]) == (201, made.json()["id"])
        changed = archive[:-10_240] + bytes(10_240) + b"x"
        other = await client.post("/templates/import?name=elm", content=changed, headers=headers)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
        other = await client.post("/templates/import?name=fir", content=archive, headers=headers)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
        assert sorted(each.name for each in await host.ls()) == ["elm", "oak"]
