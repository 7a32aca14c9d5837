"""The end of a server: what has no end of its own ends with it at once, and clients can tell."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import msgspec
import pytest
from httpx_sse import aconnect_sse
from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from conftest import HostFactory
from coppice.client.connecting import connect_async
from coppice.client.remote import patience
from coppice.errors import HostCannot
from coppice.model import State
from coppice.requests import EventsRequest, LogsRequest, OpenCopyRequest, OpenExecRequest, StandbyRequest, StreamRequest
from fakes.hosting import boot
from servers import Servers, client_of

SOON_S = 5.0  # half of the grace that requests under way get
DEADLINE_S = 60.0


async def opened(stack: AsyncExitStack, address: str, path: str, first: object = None) -> ClientConnection:
    """Return a WebSocket that has sent a first frame."""
    socket = await stack.enter_async_context(unix_connect(address.removeprefix("unix:"), f"ws://coppice{path}"))
    if first is not None:
        await socket.send(msgspec.json.encode(first).decode())
    return socket


async def streamed(stack: AsyncExitStack, client: httpx.AsyncClient, path: str) -> AsyncIterator[str]:
    """Return the data of server-sent events. An answer that is cut off raises."""
    source = await stack.enter_async_context(aconnect_sse(client, "GET", path))
    assert source.response.status_code == 200
    return (event.data async for event in source.aiter_sse())


async def test_followers_do_not_delay_the_end(servers: Servers, make_host: HostFactory) -> None:
    """One of each kind is open. Streams end like complete answers, WebSockets with 'service restart',
    and those who wait are told to ask again.
    """
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        local = await stack.enter_async_context(make_host())
        vm = await boot(local)
        address = await servers.start()
        client = await stack.enter_async_context(client_of(address))
        events = await streamed(stack, client, "/events?after=0")
        assert "oak" in await anext(events)
        lines = await streamed(stack, client, f"/instances/{vm.id}/logs?follow=true")
        assert await anext(lines)
        waits = [
            asyncio.ensure_future(client.get(f"/instances/{vm.id}/wait?state=Standby&timeout=5m")),
            asyncio.ensure_future(client.post("/call/wait", json={"instance": "oak", "deadline_s": 300})),
        ]
        command = OpenExecRequest(instance="oak", argv=["cat"])
        sockets = [
            await opened(stack, address, "/stream/logs", LogsRequest(instance="oak", follow=True)),
            await opened(stack, address, f"/instances/{vm.id}/console"),
            await opened(stack, address, "/stream/exec", command),
            await opened(stack, address, f"/instances/{vm.id}/exec", {"command": ["cat"]}),
            await opened(stack, address, "/stream/copy", OpenCopyRequest(instance="oak")),
            await opened(stack, address, "/stream/upload", {"operation": "image_import", "name": "a.tar"}),
        ]
        for socket in (*sockets[:3], sockets[4]):  # the others send nothing at first
            await socket.recv()
        await asyncio.wait(waits, timeout=0.5)
        assert not any(each.done() for each in waits)

        begin = time.monotonic()
        await servers.end(signal.SIGTERM)
        assert time.monotonic() - begin < SOON_S
        assert servers.status == 0
        async for _ in events:
            pass
        async for _ in lines:
            pass
        for socket in sockets:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await socket.recv()
            assert socket.close_code == CloseCode.SERVICE_RESTART
        for answer in await asyncio.gather(*waits):
            assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
            assert "retry-after" in answer.headers


@pytest.mark.parametrize(
    "request_", [LogsRequest(instance="oak", follow=True), OpenExecRequest(instance="oak", argv=["cat"])]
)
async def test_a_client_says_that_the_server_has_ended(
    servers: Servers, make_host: HostFactory, request_: StreamRequest[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log and the command have not ended, so the stream ends with an error."""
    monkeypatch.setattr(patience, "PERSIST_S", 0.2)
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        local = await stack.enter_async_context(make_host())
        await boot(local)
        host = await stack.enter_async_context(connect_async(await servers.start()))
        stream = await stack.enter_async_context(host.stream(request_))
        reading = asyncio.ensure_future(_read(stream))
        await servers.end(signal.SIGTERM)
        with pytest.raises(HostCannot, match="the server has ended"):
            await reading


async def _read(stream: AsyncIterable[object]) -> None:
    async for _ in stream:
        pass


async def test_events_are_followed_from_one_server_to_the_next(servers: Servers, make_host: HostFactory) -> None:
    """What happens while no server runs is not missed, also by a client that has seen no event yet."""
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        local = await stack.enter_async_context(make_host())
        vm = await boot(local)
        host = await stack.enter_async_context(connect_async(await servers.start()))
        events = await stack.enter_async_context(host.stream(EventsRequest(follow=True)))
        first = asyncio.ensure_future(anext(events))
        async with client_of(servers.address) as client:
            while "/events" not in (await client.get("/metrics")).text:  # the stream has begun
                await asyncio.wait({first}, timeout=0.05)
        await servers.end(signal.SIGTERM)
        await local.call(StandbyRequest(instance=vm.id))
        await servers.start()
        found = await first
        assert (found.name, found.state) == ("oak", State.STANDBY)
