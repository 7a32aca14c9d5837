"""Wait for a server: as long as it likes if it lives, and not for ever if it is gone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from coppice.errors import Busy, HostCannot

T = TypeVar("T")
PERSIST_S: Final = 30.0
"""Seconds for which a request is repeated if the server does not answer: enough to restart it."""
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0


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
