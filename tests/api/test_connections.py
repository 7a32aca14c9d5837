"""The frames of `/stream/connect`: what a client of any language must and must not send."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, unix_connect

from agent_process import agent_binary
from conftest import HostFactory
from fakes.hosting import boot
from fakes.relay import files_below

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
async def _deadline(tmp_path: Path) -> AsyncIterator[None]:
    """Let fake guests reach the sockets of the test's directory, and bound each test."""
    agent_binary("static")  # the first call compiles it, which can take as long as a deadline
    with files_below(tmp_path):
        async with asyncio.timeout(DEADLINE_S):
            yield


@contextlib.asynccontextmanager
async def connected(address: str, to: int | str) -> AsyncIterator[ClientConnection]:
    """Open a WebSocket and send the request."""
    async with unix_connect(address.removeprefix("unix:"), "ws://coppice/stream/connect") as socket:
        await socket.send(json.dumps({"instance": "oak", "to": to}))
        yield socket


async def text(socket: ClientConnection) -> dict[str, Any]:
    """Return the next text frame. Skip bytes."""
    while isinstance(frame := await socket.recv(), bytes):
        pass
    found: dict[str, Any] = json.loads(frame)
    return found


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what arrives, then close."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def silent(path: Path) -> AsyncIterator[None]:
    """Serve a unix socket without reading from it, for a block."""
    over = asyncio.Event()
    serving: list[asyncio.Task[None] | None] = []

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        await over.wait()
        writer.transport.abort()

    async with await asyncio.start_unix_server(serve, path):
        yield
        over.set()
        await asyncio.gather(*filter(None, serving))


async def test_a_whole_conversation(socket_address: str, make_host: HostFactory, tmp_path: Path) -> None:
    """The server says that it is open, gives credit, ends its direction, and closes the WebSocket."""
    async with make_host() as local, await asyncio.start_unix_server(echo, tmp_path / "s"):
        await boot(local)
        async with connected(socket_address, f"unix:{tmp_path}/s") as socket:
            assert await text(socket) == {}
            await socket.send(b"hello")
            frames = [await socket.recv() for _ in range(2)]
            assert sorted(map(str, frames)) == ["b'hello'", '{"window": 5}']
            await socket.send('{"eof": true}')
            assert await text(socket) == {"eof": True}
            await socket.wait_closed()
            assert socket.close_code == 1000


async def test_errors_have_the_errno_of_the_guest(socket_address: str, make_host: HostFactory, tmp_path: Path) -> None:
    """A client in another language can tell them apart."""
    async with make_host() as local:
        await boot(local)
        async with connected(socket_address, f"unix:{tmp_path}/none") as socket:
            found = await text(socket)
            assert (found["error"]["code"], found["errno"]) == ("guest_refused", 2)
            assert found["error"]["hint"]
        async with connected(socket_address, 0) as socket:
            assert (await text(socket))["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("wrong", ["too much", "after the end", "no JSON"])
async def test_a_client_that_breaks_the_rules(
    socket_address: str, make_host: HostFactory, tmp_path: Path, wrong: str
) -> None:
    """The error says what was wrong. The server keeps no more bytes than the window."""
    async with make_host() as local, silent(tmp_path / "s"):
        await boot(local)
        async with connected(socket_address, f"unix:{tmp_path}/s") as socket:
            assert await text(socket) == {}
            if wrong == "too much":
                for _ in range(64):
                    await socket.send(bytes(1 << 16))
            elif wrong == "after the end":
                await socket.send('{"eof": true}')
                await socket.send(b"x")
            else:
                await socket.send("{")
            while "error" not in (found := await text(socket)):
                assert found.keys() == {"window"}
            assert found["error"]["code"] == "invalid_request"
