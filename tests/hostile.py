"""A guest with custom answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from coppice.agent.channel import Channel
from coppice.agent.protocol import Frame
from fakes.wire import Peer

Answer = Callable[[Peer, Frame], Awaitable[None]]


@contextlib.asynccontextmanager
async def talking_to(answer: Answer, patience_s: float) -> AsyncIterator[Channel]:
    """Open a channel to a guest with custom answers."""
    ours, theirs = socket.socketpair()

    async def serve() -> None:
        async with Peer.over(theirs) as peer:
            while (frame := await peer.receive()) is not None:
                await answer(peer, frame)

    guest = asyncio.create_task(serve())
    channel = await Channel.over(ours, patience_s)
    try:
        yield channel
    finally:
        await channel.close()
        guest.cancel()
        await asyncio.gather(guest, return_exceptions=True)
