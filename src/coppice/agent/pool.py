"""The connections of this process to agents: one for each machine, shared by its sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Final

from coppice.agent.channel import Channel
from coppice.completion import all_of

LINGER_S: Final = 0.5  # a connection stays open for so long after its last session


class _Shared:
    """A connection, and how many sessions use it or wait for it."""

    def __init__(self) -> None:
        self.opening = asyncio.Lock()
        self.stack = contextlib.AsyncExitStack()
        self.channel: Channel | None = None
        self.users = 0
        self.timer: asyncio.TimerHandle | None = None


class Pool:
    """Connections by machine. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, _Shared] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def use(self, key: Hashable, connection: AbstractAsyncContextManager[Channel]) -> AsyncIterator[Channel]:
        """Yield the machine's channel. If there is none that works, open `connection`."""
        shared = self._shared.get(key)
        if shared is None or (shared.channel is not None and shared.channel.failure is not None):
            if shared is not None:
                self._retire(key, shared)
            shared = self._shared[key] = _Shared()
        shared.users += 1
        if shared.timer is not None:
            shared.timer.cancel()
        try:
            async with shared.opening:
                if shared.channel is None:
                    shared.channel = await shared.stack.enter_async_context(connection)
            yield shared.channel
        finally:
            shared.users -= 1
            if shared.users == 0:
                if self._shared.get(key) is not shared or shared.channel is None or shared.channel.failure is not None:
                    await self._close(key, shared)
                else:
                    shared.timer = asyncio.get_running_loop().call_later(LINGER_S, self._retire, key, shared)

    def _retire(self, key: Hashable, shared: _Shared) -> None:
        """Use the connection for no further session, and close it when none uses it."""
        if self._shared.get(key) is shared:
            del self._shared[key]
        if shared.users == 0:
            task = asyncio.get_running_loop().create_task(self._close(key, shared))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, key: Hashable, shared: _Shared) -> None:
        if self._shared.get(key) is shared:
            del self._shared[key]
        if shared.timer is not None:
            shared.timer.cancel()
        await shared.stack.aclose()

    async def close_idle(self, key: Hashable) -> None:
        """Close the machine's connection if no session uses it."""
        shared = self._shared.get(key)
        if shared is not None and shared.users == 0:
            await self._close(key, shared)

    async def close(self) -> None:
        """Close all connections. Sessions that still use one fail."""
        everything = list(self._shared.items())
        await all_of(self._close(key, shared) for key, shared in everything)
        await asyncio.gather(*self._closing, return_exceptions=True)
