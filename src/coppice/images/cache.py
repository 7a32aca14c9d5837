"""The cache of layers that were pulled from registries.

    blobs/<owner>/blobs/sha256/<hex>    a complete layer, config or manifest; `_` is the operator
    blobs/<owner>.lock                  shared by pulls, exclusive while the cache is removed
    blobs/<owner>/<hex>.lock            held by the pull of one manifest
    blobs/.slot<N>.lock                 held by a pull: no more than SLOTS at once

Each owner has a cache of its own. With a common one, an owner could get a layer of another owner
by listing its digest in a manifest.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from coppice.content.store import Removed
from coppice.linux.files import allocated_bytes
from coppice.state import locks

SLOTS = 3
_WAIT_S = 4 * 3600.0


class LayerCache:
    """The cached layers of one owner."""

    def __init__(self, root: Path, owner: str | None) -> None:
        self.directory = root / (owner or "_")
        self.blobs = self.directory / "blobs"
        self._lock = root / f"{self.directory.name}.lock"
        self._slots = [root / f".slot{number}.lock" for number in range(SLOTS)]

    @contextlib.asynccontextmanager
    async def hold(self, digest: str, what: str) -> AsyncIterator[None]:
        """Hold the cache for the pull of one manifest. A second pull of the manifest waits for the
        first.

        :raises Busy: the other pull, or all slots, took longer than the deadline
        """
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with locks.hold(self._lock, shared=True, deadline_s=_WAIT_S, what="the cache of layers"):
            self.blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.directory / f"{digest.partition(':')[2]}.lock"
            async with locks.hold(lock, deadline_s=_WAIT_S, what=what):
                try:
                    async with locks.hold_one_of(self._slots, deadline_s=_WAIT_S, what="all pulls"):
                        yield
                finally:
                    locks.remove(lock)


def sweep(root: Path, *, dry_run: bool = False) -> list[Removed]:
    """Remove the caches of all owners that no pull uses; with `dry_run`, only return them."""
    found = []
    for directory in sorted(path for path in root.iterdir() if path.is_dir()):
        lock = root / f"{directory.name}.lock"
        descriptor = locks.try_lock(lock)
        if descriptor is None:
            continue
        try:
            found.append(Removed(directory, allocated_bytes(directory)))
            if not dry_run:
                shutil.rmtree(directory)
        finally:
            locks.remove(lock)
            locks.release(descriptor)
    return found
