"""Server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from litestar.response import ServerSentEvent, ServerSentEventMessage


class EventStream(ServerSentEvent):
    """Litestar's response without its first step, which starts a thread for each stream."""

    def __init__(
        self, messages: AsyncIterator[ServerSentEventMessage], *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(messages, headers=headers)
        self.iterator = _encoded(messages)


async def _encoded(messages: AsyncIterator[ServerSentEventMessage]) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message.encode()
