"""Wait for a server: as long as it likes if it lives, and not for ever if it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosedError

from coppice.errors import Busy, HostCannot

T = TypeVar("T")
PERSIST_S: Final = 30.0
"""Seconds for which a request is repeated if the server does not answer: enough to restart it."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0

QUIET_S: Final = 20.0  # without a frame, after which the server is asked for a sign of life
PATIENCE_S: Final = 40.0  # for that sign


async def received(connection: ClientConnection) -> str | bytes:
    """Return the next frame.

    The keepalive of the WebSocket's library is off: it counts the time in which nobody reads, as
    when the output goes to a pager, and ends a connection that works.

    :raises ConnectionClosed: the connection ended, or the server gives no sign of life
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(QUIET_S):
            return await connection.recv()
    receiving = asyncio.ensure_future(connection.recv())
    try:
        while not receiving.done():
            sign = asyncio.ensure_future(await connection.ping())
            # A frame is a sign too: the answer to the ping may come behind many of them.
            signs: set[asyncio.Future[Any]] = {receiving, sign}
            await asyncio.wait(signs, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and not sign.done():
                raise ConnectionClosedError(None, None)
            await asyncio.wait({receiving}, timeout=QUIET_S)
        return receiving.result()
    finally:
        receiving.cancel()
        await asyncio.wait({receiving})


async def persisting(work: Callable[[], Awaitable[T]]) -> T:
    """Return the result of `work`. Do it again if the server does not answer, which may be restarting.

    :raises HostCannot: the server has not answered for `PERSIST_S`
    :raises Busy: the server answered, but was busy until then
    """
    until, pause_s = time.monotonic() + PERSIST_S, FIRST_PAUSE_S
    while True:
        try:
            return await work()
        except (HostCannot, Busy):
            if time.monotonic() >= until:
                raise
        await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - no secret
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
