"""Events: what happens to instances is seen by every process, in order, by their owner alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from litestar.response import ServerSentEventMessage

from conftest import HostFactory
from coppice.client import AsyncHost
from coppice.client.connecting import connect_async
from coppice.model import State
from coppice.model.events import Event
from coppice.requests import EventsRequest, ForkRequest, RmRequest
from coppice.server.auth import make_token
from coppice.state import event_schema
from coppice.state.database import Database
from coppice.state.events import EventLog
from fakes.hosting import boot, make
from servers import KEY


async def read(host: AsyncHost, after: int | None = None) -> list[Event]:
    """Return the kept events."""
    async with host.stream(EventsRequest(after=after)) as events:
        return [event async for event in events]


async def test_every_change_has_its_event(any_host: AsyncHost, make_host: HostFactory) -> None:
    """Another process makes a template, forks it and removes a fork. Its internal steps are seen
    too, and nothing is seen of the internal record that a fork of a running machine takes.
    """
    async with make_host() as local:
        vm = await make(local, State.TEMPLATE)
        await local.call(ForkRequest(instance="oak", names=["elm"]))
        await local.call(ForkRequest(instance="elm", names=["ash"], from_running=True))
        await local.call(RmRequest(instance="ash"))
    events = await read(any_host)
    assert [event.id for event in events] == sorted({event.id for event in events})
    oak = [(event.kind, event.state) for event in events if event.name == "oak"]
    assert oak[0] == ("made", State.CREATED)
    assert oak[-2:] == [("state", State.STANDBY), ("state", State.TEMPLATE)]
    elm = [event for event in events if event.name == "elm"]
    assert (elm[0].kind, elm[0].parent) == ("made", vm.id)
    assert ("state", State.RUNNING) in [(event.kind, event.state) for event in elm]
    assert [event.kind for event in events if event.name == "ash"][-1] == "removed"
    assert {event.name for event in events} == {"oak", "elm", "ash"}
    assert await read(any_host, after=events[2].id) == events[3:]


async def test_new_events_are_followed(any_host: AsyncHost, make_host: HostFactory) -> None:
    """A follower gets events from its connection on, and none before."""
    async with make_host() as local:
        await make(local, State.STOPPED)
        before = await read(local)
        async with any_host.stream(EventsRequest(after=before[-1].id, follow=True)) as events:
            await boot(local, "elm")
            async with asyncio.timeout(20):
                found = await anext(events)
    assert (found.kind, found.name) == ("made", "elm")


async def test_silence_does_not_end_a_stream(
    tcp_address: str, make_host: HostFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comments that the server sends then are no events, also after an event with an id."""
    sent: asyncio.Queue[None] = asyncio.Queue()
    encode = ServerSentEventMessage.encode

    def encoded(message: ServerSentEventMessage) -> bytes:
        if message.comment:
            sent.put_nowait(None)
        return encode(message)

    monkeypatch.setattr(ServerSentEventMessage, "encode", encoded)
    monkeypatch.setattr("coppice.server.events._KEEPALIVE_S", 0.05)
    async with (
        make_host() as local,
        connect_async(tcp_address, token=make_token(KEY, owner=None)) as host,
        host.stream(EventsRequest(follow=True)) as events,
        asyncio.timeout(60),
    ):
        for name in ("oak", "elm"):
            following = asyncio.ensure_future(anext(events))
            for _ in range(3):
                await sent.get()
            await boot(local, name)
            found = await following
            while found.state is not State.RUNNING:
                assert found.name == name
                found = await anext(events)


async def test_an_owner_sees_its_own_events_only(tcp_address: str, make_host: HostFactory) -> None:
    """Events of others are neither sent nor counted as lost."""
    async with make_host() as local:
        await make(local, State.STOPPED)
    async with connect_async(tcp_address, token=make_token(KEY, owner="ann")) as host:
        assert await read(host) == []
    async with connect_async(tcp_address, token=make_token(KEY, owner=None)) as host:
        assert {event.name for event in await read(host)} == {"oak"}


async def test_a_browser_goes_on_after_its_last_event(tcp_address: str, make_host: HostFactory) -> None:
    """The header Last-Event-ID is the place; a wrong one is refused."""
    async with make_host() as local:
        await make(local, State.STOPPED)
        first, *rest = await read(local)
    headers = {"authorization": f"Bearer {make_token(KEY, owner=None)}", "last-event-id": str(first.id)}
    async with httpx.AsyncClient(base_url=tcp_address, headers=headers) as client:
        text = (await client.get("/events", params={"follow": "false"})).text
        assert [line for line in text.splitlines() if line.startswith("id:")] == [f"id: {each.id}" for each in rest]
        wrong = await client.get("/events", headers={"last-event-id": "x"})
        assert wrong.status_code == 400


async def test_lost_events_are_reported(make_host: HostFactory, fake_home: Path, tmp_path: Path) -> None:
    """Who comes back too late learns that events are missing."""
    async with make_host() as local:
        await make(local, State.STOPPED)
        events = await read(local)
        with local.local.rooms.store._db.write() as connection:
            connection.execute("DELETE FROM events WHERE id = ?", (events[0].id,))
        late = await read(local, after=events[0].id - 1)
        assert [event.kind for event in late] == ["lost", *(event.kind for event in events[1:])]
        assert await read(local, after=events[0].id) == events[1:]


def test_the_newest_events_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is bounded."""
    monkeypatch.setattr(event_schema, "KEPT", 10)
    database = Database(tmp_path / "coppice.db")
    with database.write() as connection:
        for number in range(30):
            connection.execute(
                "INSERT INTO instances (id, name, state, image, created_at, record) VALUES (?, ?, 'Created', 'i', 1.0, x'7b7d')",
                (str(number), str(number)),
            )
    log = EventLog(database)
    events, last = log.after(0, None)
    assert (events[0].kind, [event.id for event in events[1:]], last) == ("lost", list(range(21, 31)), 30)
    assert log.newest() == 30
    database.close()


@pytest.mark.parametrize("wrong", ["x", "-1", "1.0", "9" * 5000, "9" * 20, "9" * 19, "\u0663".encode()])
async def test_a_wrong_last_event_id_is_the_clients_error(tcp_address: str, wrong: str | bytes) -> None:
    """However long, and whatever digits it has."""
    headers = {b"authorization": f"Bearer {make_token(KEY, owner=None)}".encode()}
    headers[b"last-event-id"] = wrong if isinstance(wrong, bytes) else wrong.encode()
    async with httpx.AsyncClient(base_url=tcp_address) as client:
        answer = await client.get("/events", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
