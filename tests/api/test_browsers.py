"""What a server gives to browsers and refuses them: the page's files, tokens of sockets, and pages
of other servers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
import websockets
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from conftest import HostFactory
from coppice.model import State
from coppice.requests import ForkRequest, TreeRequest
from coppice.server.auth import make_token
from coppice.server.serving import Listening
from documentation import ROOT
from fakes.driver import FakeDriver
from fakes.hosting import boot, make
from servers import KEY, client_of, fake_hosts, served

WEB = ROOT / "src/coppice/server/web"


def in_websocket_form(address: str) -> str:
    """Return the address for WebSockets."""
    return address.replace("http", "ws", 1)


async def test_the_page_is_public_and_may_load_its_own_files_only(tcp_address: str) -> None:
    """Its policy allows no other host, no inline script and no frame. Its nonce is new each time."""
    async with httpx.AsyncClient(base_url=tcp_address) as client:
        first, second = await client.get("/"), await client.get("/")
        policy = first.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; " in policy
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src 'self' 'unsafe" not in policy
        nonce = re.search("'nonce-(.*?)'", policy)
        assert nonce is not None
        assert f'nonce="{nonce[1]}"' in first.text
        assert nonce[1] not in second.text
        linked = re.findall(r'(?:src|href)="(/assets/[^"]*)"', first.text)
        assert linked
        for path in linked:
            assert (await client.get(path)).status_code == 200


async def test_files_of_the_page_are_checked_again_and_rarely_sent(tcp_address: str) -> None:
    """Each file has a type that browsers accept with `nosniff`, and 304 for the same version."""
    types = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    async with httpx.AsyncClient(base_url=tcp_address) as client:
        for file in WEB.rglob("*.*"):
            if file.suffix in types:
                found = await client.get(f"/assets/{file.relative_to(WEB)}")
                assert found.content == file.read_bytes()
                assert found.headers["content-type"].startswith(types[file.suffix])
                assert found.headers["x-content-type-options"] == "nosniff"
                again = await client.get(found.url.path, headers={"if-none-match": found.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    ["../page.py", "%2e%2e/page.py", "..%2fpage.py", "/etc/passwd", "vendor", "", "index.html", "%00"],
)
async def test_only_files_of_the_page_are_served(tcp_address: str, path: str) -> None:
    """No path leads out of the directory."""
    async with httpx.AsyncClient() as client:
        url = httpx.URL(tcp_address).copy_with(raw_path=f"/assets/{path}".encode())
        assert (await client.get(url)).status_code in (400, 404)


async def test_the_tree_is_that_of_the_call(tcp_address: str, make_host: HostFactory) -> None:
    """`GET /tree` lists the caller's instances, or one with its forks."""
    async with make_host() as local:
        await make(local, State.TEMPLATE)
        await local.call(ForkRequest(instance="oak", names=["elm"]))
        tree = await local.call(TreeRequest())
    headers = {"authorization": f"Bearer {make_token(KEY, owner=None)}"}
    async with httpx.AsyncClient(base_url=tcp_address, headers=headers) as client:
        found = (await client.get("/tree")).json()
        assert [(node["instance"]["id"], node["depth"]) for node in found] == [
            (node.instance.id, node.depth) for node in tree
        ]
        assert found[1]["memory"]["mapped_bytes"] == found[0]["memory"]["mapped_bytes"] > 0
        part = (await client.get("/tree", params={"instance": "elm"})).json()
        assert [node["instance"]["name"] for node in part] == ["elm"]
        assert (await client.get("/tree", params={"instance": "ash"})).status_code == 404
        others = {"authorization": f"Bearer {make_token(KEY, owner='ann')}"}
        assert (await client.get("/tree", headers=others)).json() == []


@pytest.mark.parametrize(
    "path", ["/stream/exec", "/instances/oak/exec", "/instances/oak/console", "/stream/logs", "/stream/connect"]
)
async def test_a_socket_takes_its_token_as_a_subprotocol(tcp_address: str, make_host: HostFactory, path: str) -> None:
    """The server chooses the plain subprotocol, never the one with the token. A wrong token is refused."""
    async with make_host() as local:
        await boot(local)
    url = in_websocket_form(tcp_address) + path
    token = make_token(KEY, owner=None)
    offered = [Subprotocol("coppice"), Subprotocol(f"coppice.token.{token}")]
    async with websockets.connect(url, subprotocols=offered) as socket:
        assert socket.subprotocol == "coppice"
    for wrong in ([Subprotocol("coppice")], [Subprotocol("coppice"), Subprotocol("coppice.token.x")]):
        with pytest.raises(InvalidStatus) as caught:
            await websockets.connect(url, subprotocols=wrong)
        assert caught.value.response.status_code == 401


async def test_a_console_is_followed(tcp_address: str, make_host: HostFactory) -> None:
    """The last lines come first, then new ones. The socket ends with the machine."""
    headers = {"authorization": f"Bearer {make_token(KEY, owner=None)}"}
    async with make_host() as local:
        vm = await boot(local)
        console = local.local.rooms.directory(vm.id) / "console.log"
        console.write_bytes(b"one\r\ntwo\r\n")
        url = f"{in_websocket_form(tcp_address)}/instances/{vm.id[:8]}/console?tail=1"
        async with asyncio.timeout(20), websockets.connect(url, additional_headers=headers) as socket:
            assert await socket.recv() == b"two\r\n"
            with console.open("ab") as stream:
                stream.write(b"three\n")
            assert await socket.recv() == b"three\n"
            await (await local.get("oak")).stop(grace_s=0)
            assert [frame async for frame in socket] == []
        with pytest.raises(InvalidStatus) as caught:
            await websockets.connect(url.replace(vm.id[:8], "none"), additional_headers=headers)
        assert caught.value.response.status_code == 404


FOREIGN: list[Mapping[str, str]] = [
    {"origin": "https://example.org"},
    {"origin": "null"},
    {"host": "rebound.example.org:8080"},
    {"host": "rebound.example.org:8080", "origin": "http://rebound.example.org:8080"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: " ".join(headers.values()))
@pytest.mark.parametrize("kind", ["socket", "tcp"])
async def test_pages_of_other_servers_cannot_use_a_server_without_tokens(
    fake_home: Path, driver: FakeDriver, tmp_path: Path, headers: Mapping[str, str], kind: str
) -> None:
    """Any page that the user visits can reach loopback. It can neither list nor change anything, nor
    open a socket.
    """
    where = Listening(port=0) if kind == "tcp" else Listening(socket=tmp_path / "coppice.sock")
    async with served(fake_hosts(fake_home, driver), where, None) as address:
        client = client_of(address) if kind == "socket" else httpx.AsyncClient(base_url=address)
        async with client:
            for path in ("/call/ls", "/call/gc"):
                refused = await client.post(path, json={}, headers=headers)
                assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
                assert refused.json()["hint"]
            assert (await client.get("/tree", headers=headers)).status_code == 403
            own = {"origin": "http://coppice"} if kind == "socket" else {"origin": address}
            assert (await client.post("/call/ls", json={}, headers=own)).status_code == 200
            for host in ("localhost:8080", "127.0.0.1", "[::1]:8080", "coppice", "a.localhost"):
                assert (await client.get("/tree", headers={"host": host})).status_code == 200


async def test_pages_of_other_servers_cannot_open_sockets(fake_home: Path, driver: FakeDriver) -> None:
    """Browsers apply no same-origin policy to WebSockets, so the server does."""
    async with served(fake_hosts(fake_home, driver), Listening(port=0), None) as address:
        url = in_websocket_form(address) + "/stream/exec"
        with pytest.raises(InvalidStatus) as caught:
            await websockets.connect(url, additional_headers={"origin": "https://example.org"})
        assert caught.value.response.status_code == 403
        async with websockets.connect(url, additional_headers={"origin": address}):
            pass


async def test_a_listener_of_a_quiet_log_that_goes_away_is_let_go(tcp_address: str, make_host: HostFactory) -> None:
    """The server does not wait for the next line to find that the client has gone."""
    headers = {"authorization": f"Bearer {make_token(KEY, owner=None)}"}
    async with make_host() as local:
        vm = await boot(local)
        console = local.local.rooms.directory(vm.id) / "console.log"
        console.write_bytes(b"one\n")

        for path in ("/stream/logs", f"/instances/{vm.id}/console"):
            url = in_websocket_form(tcp_address) + path
            async with websockets.connect(url, additional_headers=headers) as socket:
                if path == "/stream/logs":
                    await socket.send(json.dumps({"instance": "oak", "follow": True}))
                assert (await socket.recv()).strip() == b"one"
                opened = open_files(console.name)
                assert opened >= 1
            async with asyncio.timeout(20):
                while open_files(console.name):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.01)


def open_files(name: str) -> int:
    """Return how many descriptors of this process are of a file with this name."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += link.readlink().name == name
        except OSError:
            continue
    return count


async def test_clients_of_events_that_go_away_are_no_errors(
    fake_home: Path, driver: FakeDriver, make_host: HostFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that is closed leaves nothing in the server's log."""
    async with make_host() as local:
        await boot(local)
    with caplog.at_level(logging.ERROR):
        async with served(fake_hosts(fake_home, driver), Listening(port=0), None) as address:
            for number in range(20):
                async with (
                    httpx.AsyncClient(base_url=address) as client,
                    client.stream("GET", "/events", params={"after": 0} if number % 2 else {}) as answer,
                ):
                    assert answer.headers["last-event-id"].isdecimal()
                    if number % 2:
                        await anext(answer.aiter_lines())
    assert [record.message for record in caplog.records] == []


async def test_a_stream_of_events_says_where_it_begins(tcp_address: str, make_host: HostFactory) -> None:
    """A client that lists instances after the answer's headers misses no event."""
    headers = {"authorization": f"Bearer {make_token(KEY, owner=None)}"}
    async with httpx.AsyncClient(base_url=tcp_address, headers=headers) as client, make_host() as local:
        async with client.stream("GET", "/events") as answer:
            begin = int(answer.headers["last-event-id"])
            await boot(local)
            async with asyncio.timeout(20):
                async for line in answer.aiter_lines():
                    if line.startswith("id:"):
                        break
        assert int(line.partition(":")[2]) == begin + 1
