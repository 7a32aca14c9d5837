"""The open hosts of a server: one per owner, over one data directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coppice.completion import all_of
from coppice.host import LocalBackend

HostMaker = Callable[[str | None], LocalBackend]


class Hosts:
    """Opens the host of an owner at the owner's first request, and keeps it open.

    A host limits its operations to the records of its owner, so isolation is that of the library.
    """

    def __init__(self, make: HostMaker) -> None:
        """`make` returns an unopened host for an owner, None for the operator."""
        self._make = make
        self._open: dict[str | None, LocalBackend] = {}
        self._opening = asyncio.Lock()

    async def of(self, owner: str | None) -> LocalBackend:
        """Return the open host of an owner."""
        if owner not in self._open:
            async with self._opening:
                if owner not in self._open:
                    self._open[owner] = await self._make(owner).open()
        return self._open[owner]

    async def close(self) -> None:
        """Close all hosts. Instances keep running. Idempotent."""
        hosts, self._open = list(self._open.values()), {}
        await all_of(host.close() for host in hosts)
