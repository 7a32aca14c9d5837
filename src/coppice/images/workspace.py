"""The private directory of one build, with its limits and its progress."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Literal, Self

from coppice import stopping
from coppice.errors import ImageError
from coppice.model import GIB, MIB, Progress, ProgressSink, Record

CHUNK = 128 * 1024


class Limits(Record, frozen=True, kw_only=True):
    """How much an archive may unpack to. Exceeding a limit is an ImageError, not a full disk."""

    max_members: int = 1_000_000  # in all layers
    max_header_bytes: int = 128 * MIB  # names, link targets and extended attributes of all members
    max_bytes: int = 64 * GIB  # of all unpacked layers, and of the image
    max_layers: int = 256
    max_document_bytes: int = 4 * MIB  # of one manifest, index or config


class Workspace:
    """One build: its directory, its limits and its progress."""

    def __init__(self, path: Path, *, limits: Limits, progress: ProgressSink) -> None:
        self.path = path
        self.limits = limits
        self._progress = progress
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
        """Report the build's progress to the caller.

        Raises WorkStopped if the caller was cancelled.
        """
        stopping.check()
        self._progress(Progress(stage=stage, done=done, total=total, unit=unit))

    def spend(self, unpacked_bytes: int) -> None:
        """Count bytes from a decompressor. Raises ImageError beyond the limit."""
        stopping.check()
        self._unpacked_bytes += unpacked_bytes
        if self._unpacked_bytes > self.limits.max_bytes:
            raise ImageError(
                f"the archive unpacks to more than {self.limits.max_bytes} bytes",
                hint="make it smaller; if it should be small, do not trust it",
            )

    def spend_member(self, header_bytes: int) -> None:
        """Count one member of an archive.

        Raises ImageError beyond the limits, WorkStopped if the caller was cancelled.
        """
        stopping.check()
        self._members += 1
        self._header_bytes += header_bytes
        if self._members > self.limits.max_members or self._header_bytes > self.limits.max_header_bytes:
            raise ImageError(
                f"the archive has more than {self.limits.max_members} members, or too long names in them",
                hint="make it smaller; if it should be small, do not trust it",
            )

    def new_file(self) -> IO[bytes]:
        """Return an empty file for reading and writing, open until the build ends."""
        return self.closing.enter_context(tempfile.TemporaryFile(dir=self.path))
