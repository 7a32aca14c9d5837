"""Pulls of images that a server has under way: as many at once as the data directory allows. The others wait in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from coppice.images.cache import SLOTS
from coppice.requests import ImagePullRequest
from coppice.server.running import Operation

_MOST: Final = 1000  # remembered, of all owners


class Pull:
    """The pull of one name for one owner. Its operation is set before anyone can find it."""

    operation: Operation

    def __init__(self, request: ImagePullRequest) -> None:
        self.request = request
        self.begun = False


class Pulls:
    """The latest pull of each owner and name since the server's start."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(SLOTS)
        self._pulls: dict[tuple[str | None, str], Pull] = {}

    def get(self, owner: str | None, name: str) -> Pull | None:
        """Return the latest pull of a name."""
        return self._pulls.get((owner, name))

    def add(self, owner: str | None, name: str, pull: Pull) -> None:
        """Remember a pull. Forget the oldest ended ones if there are too many."""
        self._pulls.pop((owner, name), None)
        ended = [key for key, each in self._pulls.items() if each.operation.ended]
        for key in ended[: max(0, len(self._pulls) + 1 - _MOST)]:
            del self._pulls[key]
        self._pulls[owner, name] = pull

    def all(self, owner: str | None) -> dict[str, Pull]:
        """Return the pulls of an owner that are under way or have failed, by name."""
        return {
            name: each
            for (whose, name), each in self._pulls.items()
            if whose == owner and each.operation.view().status != "succeeded"
        }

    def position(self, pull: Pull) -> int | None:
        """Return the place of a pull among those that wait, from 1; None: it does not wait."""
        waiting = [each for each in self._pulls.values() if not each.begun and not each.operation.ended]
        return waiting.index(pull) + 1 if pull in waiting else None

    @contextlib.asynccontextmanager
    async def turn(self, pull: Pull) -> AsyncIterator[None]:
        """Wait for the turn of a pull, which has it for the block."""
        async with self._slots:
            pull.begun = True
            yield
