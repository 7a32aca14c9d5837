"""Requests cost no more than they must: no packet waits for another, and no thread is started for what
does not block.
"""

from __future__ import annotations

import socket
from typing import NoReturn

import msgspec
import pytest
from httpx_sse import aconnect_sse

from conftest import HostFactory
from coppice.errors import Overloaded, TooManyOperations
from coppice.model import State
from coppice.requests import ForkRequest
from coppice.server import running
from coppice.server.running import Limits, Operations
from coppice.server.serving import Listening, listen
from fakes.hosting import make
from servers import client_of


def test_packets_of_an_answer_do_not_wait() -> None:
    """With Nagle's algorithm the body of an answer waits 40 ms for the receipt of its head."""
    with (
        listen(Listening(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_the_framework_starts_no_threads(
    socket_address: str, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs each function that is no coroutine in a thread, such as a guard or the start of a stream."""

    async def refuse(*_: object) -> NoReturn:
        raise AssertionError("a thread")

    async with make_host() as local:
        await make(local, State.TEMPLATE)
    monkeypatch.setattr("litestar.utils.sync.sync_to_thread", refuse)
    monkeypatch.setattr("litestar.response.sse.sync_to_thread", refuse)
    async with client_of(socket_address) as client:
        assert (await client.post("/call/ls", json={})).status_code == 200
        body = msgspec.json.encode(ForkRequest(instance="oak", names=["elm"]))
        async with aconnect_sse(client, "POST", "/call/fork", content=body) as source:
            assert [event.event async for event in source.aiter_sse()] == ["progress", "result"]
        async with aconnect_sse(client, "GET", "/events?after=0&follow=false") as source:
            assert [event.event async for event in source.aiter_sse()]


async def test_ended_operations_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are of running ones, by owner and in all, and the oldest ended ones are forgotten."""
    monkeypatch.setattr(running, "_MOST_KEPT", 3)
    operations = Operations(Limits(of_owner=1, of_all=2))

    async def work(_: object) -> None:
        """End at once."""

    first = operations.start("ls", "ann", work)
    with pytest.raises(TooManyOperations):
        operations.start("ls", "ann", work)
    second = operations.start("ls", "bob", work)
    with pytest.raises(Overloaded):
        operations.start("ls", "eve", work)
    await first.result()
    await second.result()
    made = [first, second]
    for _ in range(5):
        made.append(operations.start("ls", "ann", work))
        await made[-1].result()
    kept = [each.id for each in operations.all(None)]
    assert kept == [each.id for each in made[-3:]]
