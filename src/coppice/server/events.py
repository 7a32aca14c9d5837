"""`GET /events`: what happens to instances, as server-sent events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Final

import msgspec
from litestar import get
from litestar.params import HeaderParameter, QueryParameter
from litestar.response import ServerSentEventMessage

from coppice.completion import in_thread
from coppice.errors import UsageError
from coppice.host import LocalBackend
from coppice.requests import EventsRequest
from coppice.server.context import Server, TheCaller, TheServer
from coppice.server.document import EVENTS
from coppice.server.ending import following
from coppice.server.sse import EventStream
from coppice.server.table import scope_of

_KEEPALIVE_S: Final = 15.0
_MOST_DIGITS: Final = 19

After = Annotated[int | None, QueryParameter(description="Begin after this event. Default: with the next one.", ge=0)]
Follow = Annotated[bool, QueryParameter(description="Stay open for new events.")]
LastId = Annotated[
    str | None, HeaderParameter(name="last-event-id", description="As `after`. Browsers send it when they reconnect.")
]


@get(
    "/events",
    summary="Follow what happens to instances.",
    tags=["server"],
    opt={"scope": scope_of("events")},
    media_type=EVENTS,
)
async def events_get(
    server: TheServer, caller: TheCaller, after: After = None, follow: Follow = True, last_id: LastId = None
) -> EventStream:
    """Send an event for each instance of the caller that is made, changes its state or is removed.

    The header `Last-Event-ID` of the answer is the event after which the stream begins.
    An event `lost` says that older events are no longer kept: list the instances again.
    """
    if last_id:
        if not last_id.isascii() or not last_id.isdecimal() or len(last_id) > _MOST_DIGITS:
            raise UsageError(f"{last_id[:40]!r} is not the id of an event", hint="send the id of the last event")
        after = int(last_id)
    host = await server.host(caller)
    if after is None:
        # The place is fixed before the answer: a client that then lists instances misses no event.
        after = await in_thread(host.rooms.store.events.newest) if follow else 0
    headers = {"last-event-id": str(after)}
    return EventStream(_messages(server, host, EventsRequest(after=after, follow=follow)), headers=headers)


async def _messages(
    server: Server, host: LocalBackend, request: EventsRequest
) -> AsyncIterator[ServerSentEventMessage]:
    async with (
        host.stream(request) as events,
        contextlib.aclosing(following(events, server.ending, every_s=_KEEPALIVE_S)) as found,
    ):
        async for event in found:
            if event is None:
                yield ServerSentEventMessage(comment="no news", data=None)
            else:
                yield ServerSentEventMessage(id=event.id, event=event.kind, data=msgspec.json.encode(event).decode())
