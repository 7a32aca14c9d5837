"""Addresses of servers, and the check whether a server answers there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coppice.client.remote.address import parse_address
from coppice.client.remote.health import check
from coppice.errors import HostCannot, UsageError

DEADLINE_S = 20.0


@pytest.mark.parametrize(
    "text", ["", "localhost:8080", "ftp://x", "http://", "http://x:99999", "http://x:0", "http://[::1", "unix:a"]
)
def test_a_malformed_address_is_refused(text: str) -> None:
    """As a mistake of the user, whatever is wrong with it."""
    with pytest.raises(UsageError):
        parse_address(text)


def test_parts_of_an_address() -> None:
    """The header `Host` has no password."""
    address = parse_address("http://ann:secret@[::1]:8080/vms/")
    assert (address.host, address.port, address.authority, address.path) == ("::1", 8080, "[::1]:8080", "/vms")
    assert parse_address("http://example.org").port == 80


def test_https_and_proxies_are_not_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need the library; the proxy of other schemes does not matter."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert parse_address("http://x").is_direct
    assert not parse_address("https://x").is_direct
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert not parse_address("http://x").is_direct
    assert parse_address("unix:/s").is_direct


@pytest.mark.parametrize("text", ["http://ann:secret@x", "http://x/a b", "http://x/é"])
def test_what_needs_more_than_a_plain_request_is_not_direct(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library sends the password, and quotes the path."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert parse_address("http://x/a").is_direct
    assert not parse_address(text).is_direct


def test_a_scheme_is_of_either_case() -> None:
    """As in a browser. The name of a path is not."""
    assert parse_address("HTTPS://Example.org/A/").url == "https://Example.org/A"


@contextlib.asynccontextmanager
async def answering(path: Path, answer: bytes, asked: list[bytes]) -> AsyncIterator[str]:
    """Serve one answer on a unix socket."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        yield f"unix:{path}"


async def test_a_server_that_answers(tmp_path: Path) -> None:
    """It is asked for its health, with the token, which a proxy before it may ask for."""
    asked: list[bytes] = []
    headers = {"authorization": "Bearer t"}
    async with asyncio.timeout(DEADLINE_S), answering(tmp_path / "s", b"HTTP/1.1 200 OK\r\n\r\n", asked) as address:
        await check(parse_address(address), headers)
    assert asked == [b"GET /health HTTP/1.1\r\nHost: coppice\r\nConnection: close\r\nauthorization: Bearer t\r\n\r\n"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "it closed the connection"),
        (b"HTTP/1.1", "it closed the connection"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP/1.1 404"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "SSH-2.0-Open"),
    ],
)
async def test_another_server_is_reported_at_once(tmp_path: Path, answer: bytes, said: str) -> None:
    """No request is repeated until a deadline."""
    async with asyncio.timeout(DEADLINE_S), answering(tmp_path / "s", answer, []) as address:
        with pytest.raises(HostCannot, match=f"does not answer: .*{said}"):
            await check(parse_address(address), {})


async def test_nothing_listens(tmp_path: Path) -> None:
    """The address and the cause are named."""
    with pytest.raises(HostCannot, match=r"/nowhere does not answer: .*No such file"):
        await check(parse_address(f"unix:{tmp_path}/nowhere"), {})


async def test_the_second_address_of_a_name_is_tried_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may be of a route that drops packets."""
    tried: list[float | None] = []

    async def connect(_: str, __: int, *, happy_eyeballs_delay: float | None = None) -> None:
        tried.append(happy_eyeballs_delay)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(HostCannot):
        await check(parse_address("http://x"), {})
    assert tried == [0.25]
