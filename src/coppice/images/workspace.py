"""The private directory of one build: made, locked, and removed again however the build ends.

It is called `.staging-<random>` and lies beside the images, so that the finished image is one rename away. The process
that builds holds an flock on it. What nobody holds is the leftover of a dead process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Literal, Self

from coppice.errors import Busy, CoppiceError, ImageError
from coppice.model import GIB, MIB, Progress, ProgressSink, Record
from coppice.store import locks

PREFIX = ".staging-"
CHUNK = 128 * 1024
LOCK_DEADLINE_S = 30.0


class Limits(Record, frozen=True, kw_only=True):
    """How much an archive may unfold to. What goes beyond is an ImageError, not a full disk."""

    max_members: int = 1_000_000  # of all layers
    max_header_bytes: int = 128 * MIB  # names, link targets and extended attributes of all members
    max_bytes: int = 64 * GIB  # of all layers unpacked, and of the image
    max_layers: int = 256
    max_document_bytes: int = 4 * MIB  # of one manifest, index or config


class BuildCancelledError(CoppiceError):
    """Ends the thread of a build whose caller has gone; never reaches a user."""


class Workspace:
    """One build: its directory, its limits, its progress, and whether it is still wanted."""

    def __init__(self, path: Path, *, limits: Limits, progress: ProgressSink, cancelled: threading.Event) -> None:
        self.path = path
        self.limits = limits
        self._progress = progress
        self._cancelled = cancelled
        self._unpacked_bytes = 0
        self._members = 0
        self._header_bytes = 0
        self.closing = ExitStack()  # files that stay open until the image is written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()

    def report(
        self, stage: str, done: int, total: int | None = None, unit: Literal["bytes", "items", "ms"] = "bytes"
    ) -> None:
        """Tell the caller how far the build is; raises BuildCancelledError if the caller has gone."""
        self.check()
        self._progress(Progress(stage=stage, done=done, total=total, unit=unit))

    def check(self) -> None:
        """Raises BuildCancelledError if the caller has gone."""
        if self._cancelled.is_set():
            raise BuildCancelledError("the build was cancelled")

    def spend(self, unpacked_bytes: int) -> None:
        """Count bytes that came out of a decompressor. Raises ImageError beyond the limit."""
        self._unpacked_bytes += unpacked_bytes
        if self._unpacked_bytes > self.limits.max_bytes:
            raise ImageError(
                f"the archive unfolds to more than {self.limits.max_bytes} bytes",
                hint="make it smaller; if it should be small, do not trust it",
            )

    def spend_member(self, header_bytes: int) -> None:
        """Count one member of an archive. Raises ImageError beyond the limits, BuildCancelledError if the caller has
        gone."""
        self._members += 1
        self._header_bytes += header_bytes
        if self._members % 1024 == 0:
            self.check()
        if self._members > self.limits.max_members or self._header_bytes > self.limits.max_header_bytes:
            raise ImageError(
                f"the archive has more than {self.limits.max_members} members, or absurdly long names in them",
                hint="make it smaller; if it should be small, do not trust it",
            )

    def new_file(self) -> IO[bytes]:
        """An empty file for reading and writing, open until the build ends."""
        return self.closing.enter_context(tempfile.TemporaryFile(dir=self.path))


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock on `file` (made when missing) against all other processes and threads.

    Raises Busy after 30 seconds. Every holder lets go after a few renames.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        busy = Busy("another process holds the image catalog", hint="try again, or end that process")
        locks.wait_for(descriptor, LOCK_DEADLINE_S, busy)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staging_directory(root: Path, lock: Path) -> Iterator[Path]:
    """A new staging directory below `root`, held by this process, and removed with all that is left in it.

    It is made and locked under the catalog's `lock`, so no one sees it in between and takes it for a leftover.
    """
    path = root / f"{PREFIX}{secrets.token_hex(8)}"
    with locked(lock):
        path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def leftovers(root: Path, lock: Path) -> list[Path]:
    """The staging directories below `root` whose process is gone."""
    with locked(lock):
        return [path for path in sorted(root.glob(f"{PREFIX}*")) if not _is_held(path)]


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # its build ended just now
    try:
        return not locks.take(descriptor)
    finally:
        os.close(descriptor)
