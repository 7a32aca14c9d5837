"""Requests that no client of good will sends: each is refused with a 4xx in the shape of all errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.server.app import make_app
from coppice.server.database import DATABASE
from fakes.hosting import boot, snapshot
from servers import client_of, fake_hosts

TRICKS = (
    *("..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "%00", "oak%00", "%ff%fe", "%c0%af", "%", "%zz"),
    *("oak%0d%0aX-Injected:%201", "'%20OR%201=1--", "%F0%9F%8C%B3", "%E2%80%AE", "-rf", "a" * 5000, "%20", ";", "~"),
)
"""Segments of a path."""
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "half an object": b'{"instance": "oak"',
    "no json": b"\x00\x01\x02",
    "not utf-8": b'{"instance": "\xff\xfe"}',
    "utf-16": '{"instance": "oak"}'.encode("utf-16"),
    "lone surrogate": b'{"instance": "\\ud800"}',
    "nul in a name": b'{"instance": "oak\\u0000"}',
    "a list": b"[1, 2, 3]",
    "a text": b'"oak"',
    "null": b"null",
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "huge number": b'{"instance": ' + b"9" * 100_000 + b"}",
    "not a number": b'{"instance": NaN}',
    "unknown field": b'{"instance": "oak", "nonsense": 1}',
    "another operation": b'{"operation": "doctor", "instance": "oak"}',
    "a path as a name": b'{"instance": "../../etc/passwd"}',
    "a long name": b'{"instance": "' + b"a" * 1_000_000 + b'"}',
}
NUMBERS = (-1, 0, 2**31, 2**63, 2**64, 10**30, 1e308, -1e308, 0.5)


def routes(*methods: str) -> Iterator[tuple[str, str]]:
    """Yield the method and the path of each documented route."""
    app: Any = make_app(fake_hosts(Path("unused"), None), None)  # type: ignore[arg-type]
    while not isinstance(app, Litestar):
        app = app._app
    for path, item in app.openapi_schema.to_schema()["paths"].items():
        for method in methods:
            if method in item:
                yield method.upper(), path


def filled(path: str, segment: str) -> str:
    """Return a path with one segment for each parameter."""
    return "/".join(segment if each.startswith("{") else each for each in path.split("/"))


def everything(host: AsyncHost) -> tuple[Any, ...]:
    """Return all that a request could change, except the audit log."""
    files, *others = snapshot(host)
    return {name: value for name, value in files.items() if not Path(name).name.startswith(DATABASE)}, *others


def check(answer: Any, what: object) -> None:
    """Require a 4xx or the declared 501, in the shape of all errors."""
    assert 400 <= answer.status_code < 500 or answer.status_code == 501, (what, answer.status_code, answer.text[:300])
    failure = answer.json()
    assert isinstance(failure["code"], str), (what, failure)
    assert isinstance(failure["message"], str), (what, failure)
    assert len(answer.content) < 10_000, what


@pytest.mark.parametrize("name", BODIES)
async def test_a_malformed_body_is_refused(socket_address: str, make_host: HostFactory, name: str) -> None:
    """By every route that takes one. Nothing changes, and the next request is answered."""
    async with make_host() as local:
        await boot(local)
        before = everything(local)
        harmless = name in ("nothing", "null")  # of routes whose body is optional
        async with client_of(socket_address) as client:
            for method, path in routes("post", "put"):
                if harmless and not path.startswith("/call/"):
                    continue
                headers = {"content-type": "application/json"}
                url = filled(path, "no-such-machine")
                answer = await client.request(method, url, content=BODIES[name], headers=headers)
                check(answer, (name, path))
            assert (await client.get("/health")).status_code == 200
        assert everything(local) == before


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick[:20])
async def test_a_trick_in_a_path_is_refused(socket_address: str, make_host: HostFactory, trick: str) -> None:
    """By every route with a parameter in its path."""
    async with make_host() as local:
        await boot(local)
        before = everything(local)
        async with client_of(socket_address) as client:
            for method, path in routes("get", "post", "delete", "put", "patch"):
                if "{" not in path:
                    continue
                url = f"http://coppice{filled(path, trick)}"
                request = client.build_request(method, url, json={} if method == "POST" else None)
                if request.url.raw_path == b"/":
                    continue  # the client resolves `..` itself, here to the page
                answer = await client.send(request)
                check(answer, (method, path))
                assert "x-injected" not in answer.headers
        assert everything(local) == before


async def test_a_trick_in_the_target_of_a_request_is_refused(socket_address: str) -> None:
    """As bytes that no library would send."""
    for target in (b"/instances/../../etc/passwd", b"//etc/passwd", b"/instances/\xff", b"*", b"/instances/o ak", b""):
        reader, writer = await asyncio.open_unix_connection(socket_address.removeprefix("unix:"))
        try:
            writer.write(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(20):
                answer = await reader.read()
        finally:
            writer.close()
        assert answer.split(b" ")[1][:1] == b"4", (target, answer)


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_number_out_of_range_is_refused_or_harmless(socket_address: str, number: float) -> None:
    """In every numeric parameter of a query, and in bodies."""
    fork, run = {"instance": "oak", "count": number}, {"image": "tiny", "cpus": number}
    volume = {"name": "sap", "size_gb": number}
    async with client_of(socket_address) as client:
        for path, body in (("/call/fork", fork), ("/call/run", run), ("/volumes", volume), ("/call/wait", fork)):
            check(await client.post(path, content=json.dumps(body)), (path, number))
        for url in (
            f"/audit?limit={number}",
            f"/events?follow=false&after={number}",
            f"/instances/oak/logs?tail={number}",
        ):
            answer = await client.get(url)
            assert answer.status_code < 500, (url, answer.text)


@pytest.mark.parametrize(
    "header", ["authorization", "idempotency-key", "accept", "prefer", "x-request-id", "last-event-id"]
)
async def test_a_trick_in_a_header_is_harmless(socket_address: str, header: str) -> None:
    """It is refused or ignored, and comes back in no header."""
    async with client_of(socket_address) as client:
        for value in (b"\xff\xfe", b"a" * 30_000, b"../../x", b"'; DROP TABLE keys; --", b'"'):
            for method, path, body in (
                ("POST", "/call/fork", b'{"instance": "oak"}'),
                ("GET", "/events?follow=false", b""),
            ):
                answer = await client.request(method, path, content=body, headers=[(header.encode(), value)])
                assert answer.status_code < 500, (header, value[:20], answer.text[:300])
                assert value not in answer.headers.get("x-request-id", "").encode()


async def test_a_wrong_type_names_its_field(socket_address: str) -> None:
    """The message says which field has the wrong type."""
    async with client_of(socket_address) as client:
        answer = await client.post("/call/wait", json={"instance": "oak", "deadline_s": "soon"})
        assert answer.status_code == 400
        assert "deadline_s" in answer.json()["message"]


async def test_a_wrong_method_is_told_the_right_ones(socket_address: str) -> None:
    """Also of a path with a parameter, and of one that several handlers have."""
    async with client_of(socket_address) as client:
        for method, path, allowed in (
            ("PATCH", "/instances", {"GET", "OPTIONS", "POST"}),
            ("PUT", "/instances/oak", {"DELETE", "GET", "OPTIONS", "PATCH"}),
            ("POST", "/instances/oak/snapshot-schedule", {"DELETE", "GET", "OPTIONS", "PUT"}),
            ("DELETE", "/call/ls", {"OPTIONS", "POST"}),
        ):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
            assert set(answer.headers["allow"].split(", ")) == allowed


async def test_a_wrong_parameter_is_named_as_the_client_named_it(socket_address: str) -> None:
    """And a missing body is called that."""
    async with client_of(socket_address) as client:
        answer = await client.get("/instances?state=bogus")
        assert "state: Invalid enum value" in answer.json()["message"]
        answer = await client.get("/instances/oak/logs?source=bogus")
        assert "source: Invalid enum value" in answer.json()["message"]
        assert "limit: Expected" in (await client.get("/audit?limit=0")).json()["message"]
        assert "timeout: Expected" not in (await client.get("/audit?limit=0")).json()["message"]
        assert "has no body" in (await client.post("/instances")).json()["message"]
