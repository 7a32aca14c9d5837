"""A content-addressed store: entries below one directory, each complete and read-only once it has
its name.

    <key>                   one entry, a file or a directory; the key follows from the content
    .staging-<random>/      an entry that is being made or removed; its process holds an flock on it

One rename publishes an entry, after its data is durable, and one rename removes it. So readers need
no lock, and a killed process leaves only a staging directory without a holder, which `sweep`
removes. Images, kernels, initramfs and empty disks are kept in such stores. All methods block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from coppice import stopping
from coppice.errors import NotFound
from coppice.linux.files import allocated_bytes, sync
from coppice.linux.link import IMMUTABLE
from coppice.state import locks

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,199}")
STAGING = ".staging-"

Guard = Callable[[Callable[[], None]], None]
"""Calls its argument while nothing can start to use an entry, or raises.

The transactions of `coppice.state.store` are such guards.
"""


class Removed(NamedTuple):
    """The removed entries, or those that would be, and the bytes that this frees."""

    path: Path
    size_bytes: int


class ContentStore:
    """The entries below one directory. Any number of processes and threads may use it at once."""

    def __init__(self, root: Path) -> None:
        """`root` is made with the first entry."""
        self.root = root

    def find(self, key: str) -> Path | None:
        """Return the path of an entry, or None. A malformed key never becomes a path."""
        path = self.root / key
        return path if KEY.fullmatch(key) and path.exists() else None

    def entries(self) -> list[Path]:
        """Return the paths of all entries, sorted."""
        return [path for path in self._listed() if KEY.fullmatch(path.name)]

    def make(self, key: str, fill: Callable[[Path], object]) -> Path:
        """Return an entry, making it if needed: `fill` makes a file or a directory at the path it
        is given.

        Concurrent callers make the same content, and one copy is published.
        """
        if (found := self.find(key)) is not None:
            return found
        with self.staging() as stage:
            fill(stage / key)
            return self.publish(stage / key, key)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a new staging directory, locked by this process, and remove it with its contents at
        the end.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = None
        while descriptor is None:
            stage = self.root / f"{STAGING}{os.urandom(8).hex()}"
            stage.mkdir(mode=0o700)
            descriptor = locks.try_lock(stage, create=False)  # None if a sweep was faster
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            locks.release(descriptor)

    def publish(self, staged: Path, key: str, guard: Guard = lambda rename: rename()) -> Path:
        """Give a finished file or directory its name, durably, and make it read-only.

        An existing entry stays.

        `guard` is called with the rename, once all data is durable: it may record the entry in the
        same transaction.
        """
        if not KEY.fullmatch(key):
            raise AssertionError(f"not a key: {key!r}")
        _freeze(staged)
        final = self.root / key

        def rename() -> None:
            if not final.exists():
                # Of two at once, the later file replaces the same content; the later directory
                # fails.
                try:
                    staged.rename(final)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            sync(self.root)

        guard(rename)
        return final

    def remove(self, key: str, guard: Guard, *, dry_run: bool = False) -> Removed:
        """Remove an entry while `guard` prevents new uses. Links to it elsewhere stay.

        With `dry_run`, only return what would be removed.

        :raises NotFound: there is no such entry
        """
        if (path := self.find(key)) is None:
            raise NotFound(f"{self.root} has no {key!r}", hint="another process removed it")
        removed = Removed(path, allocated_bytes(path))
        if dry_run:
            return removed
        with self.staging() as stage:

            def rename() -> None:
                path.rename(stage / key)
                sync(self.root)

            guard(rename)
        return removed

    def sweep(self, *, dry_run: bool = False) -> list[Removed]:
        """Remove what killed processes left half made or half removed; with `dry_run`, only return
        it. Idempotent.
        """
        found = []
        for path in self._listed():
            if path.name.startswith(".") and (descriptor := _take(path)) is not None:
                try:
                    found.append(Removed(path, allocated_bytes(path)))
                    if not dry_run:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                finally:
                    locks.release(descriptor)
        return found

    def _listed(self) -> list[Path]:
        try:
            return sorted(self.root.iterdir())
        except FileNotFoundError:
            return []


def _take(path: Path) -> int | None:
    try:
        return locks.try_lock(path, create=False)
    except OSError:  # a symbolic link, or another user's directory: not made here
        return None


def _freeze(staged: Path) -> None:
    """Make a file or directory read-only and durable, recursively.

    Remove symbolic links: an entry never points outside itself.
    """
    for path in (staged, *staged.rglob("*")):
        stopping.check()
        if path.is_symlink():
            path.unlink()
            continue
        path.chmod(0o755 if path.is_dir() else IMMUTABLE)
        sync(path)
