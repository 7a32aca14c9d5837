"""Read an archive that may be hostile, as its bytes arrive. Blocks.

The reader accepts only what the writer writes: each member has the name that comes next, ranges are in
order, none is outside of its file, and together they have no more bytes than the manifest says.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from coppice import stopping
from coppice.archive.format import (
    BLOCK,
    CURE,
    DIGESTS,
    FORMAT,
    LARGEST_DOCUMENT,
    LARGEST_TOTAL,
    MANIFEST,
    MOST_FILES,
    ArchivedFile,
    Digests,
    Manifest,
    add_zeros,
    decoded,
    member_of,
    total_bytes,
)
from coppice.errors import DigestMismatch, ImageError, NotSupported
from coppice.linux.clone import write_all
from coppice.linux.files import os_errors
from coppice.linux.link import IMMUTABLE
from coppice.model import Record, to_json

_RANGE = re.compile(r"data/(0|[1-9a-f][0-9a-f]{0,15})/(0|[1-9a-f][0-9a-f]{0,15})")


_UNNAMED_DISK = 1  # an earlier format
_OVERLAY = "overlay"  # the disk that it means
_OTHER = "give a file that `coppice export` wrote; `coppice image import` takes images"


class _Format(Record, frozen=True, kw_only=True):
    format: int


def _with_named_disk(text: bytes) -> bytes:
    """Return a manifest of the first format as one of the second: the layers of the overlay disk had no name."""
    parts = dict[str, msgspec.Raw]
    manifest = decoded(text, parts, "manifest")
    template = decoded(bytes(manifest.get("template", b"{}")), parts, "manifest")
    layers = decoded(bytes(template.get("disk_layers", b"[]")), tuple[int, ...], "manifest")
    template["disk_layers"] = msgspec.Raw(to_json({_OVERLAY: layers} if layers else {}))
    return to_json({**manifest, "template": msgspec.Raw(to_json(template))})


def manifest_in(beginning: bytearray) -> tuple[Manifest, int] | None:
    """Return the manifest at the beginning of an archive, and the position after it; None if more is needed.

    :raises ImageError: this is no archive, or its manifest is not valid
    :raises NotSupported: the archive has a later format
    """
    if len(beginning) < BLOCK:
        return None
    member = member_of(bytes(beginning[:BLOCK]))
    if member.name != MANIFEST or not 0 < member.size <= LARGEST_DOCUMENT:
        raise ImageError("this is not an archive of a template: it does not begin with a manifest", hint=_OTHER)
    if len(beginning) < BLOCK + member.padded:
        return None
    text = bytes(beginning[BLOCK : BLOCK + member.size])
    version = decoded(text, _Format, "manifest").format
    if version not in (_UNNAMED_DISK, FORMAT):
        raise NotSupported(
            f"the archive has format {version}, and this Coppice reads formats up to {FORMAT}",
            hint="use a newer Coppice",
        )
    manifest: Manifest = decoded(text if version == FORMAT else _with_named_disk(text), Manifest, "manifest")
    possible = all(0 <= file.data_bytes <= file.size_bytes for file in manifest.files)
    if len(manifest.files) > MOST_FILES or not possible or total_bytes(manifest.files) > LARGEST_TOTAL:
        raise ImageError("the manifest has too many files, or files of impossible sizes", hint=CURE)
    return manifest, BLOCK + member.padded


class Target(NamedTuple):
    """A file that arrives, and the new path that it gets. Without a path only its digest is computed."""

    file: ArchivedFile
    path: Path | None


class Receiver:
    """Everything after the manifest of an archive; a context manager, which closes its open file."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._kept = b""  # an incomplete header
        self._left = self._padding = 0  # of the current member
        self._document: bytearray | None = None  # the content of DIGESTS
        self._ended = False
        self._file: _File | None = None
        self._digests: list[str] = []

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        :raises ImageError: the archive is not valid
        :raises NoSpace: the disk is full
        """
        view, self._kept = memoryview(self._kept + data if self._kept else data), b""
        at = 0
        while at < len(view):
            stopping.check()
            if self._ended:
                if any(view[at:]):
                    raise ImageError("the archive goes on after its end", hint=CURE)
                return
            if self._left or self._padding:
                at += self._content(view[at:])
            elif len(view) - at < BLOCK:
                break
            else:
                self._begin(bytes(view[at : at + BLOCK]))
                at += BLOCK
        self._kept = bytes(view[at:])

    def finish(self) -> tuple[str, ...]:
        """Return the SHA-256 of each file. All of them are on disk and cannot be written to.

        :raises ImageError: the archive is truncated
        :raises DigestMismatch: a file is not what was exported
        """
        if not self._ended or self._document is None:
            raise ImageError("the archive ends too early: it is truncated", hint="send it again, as a whole")
        expected: Digests = decoded(bytes(self._document), Digests, "list of digests")
        if len(expected.sha256) != len(self._targets):
            raise ImageError("the archive does not have a digest for each file", hint=CURE)
        for target, found, wanted in zip(self._targets, self._digests, expected.sha256, strict=True):
            if found != wanted:
                raise DigestMismatch(f"the SHA-256 of {target.file.path} in the archive is wrong", hint=CURE)
        return tuple(self._digests)

    def _begin(self, block: bytes) -> None:
        if not any(block):
            if self._document is None:
                raise ImageError("the archive has no digests", hint=CURE)
            self._ended = True
            return
        member = member_of(block)
        if self._document is not None or member.size <= 0:
            raise ImageError(f"the archive has an unexpected member {member.name[:80]!r}", hint=CURE)
        self._left, self._padding = member.size, member.padded - member.size
        if member.name == DIGESTS:
            if member.size > LARGEST_DOCUMENT:
                raise ImageError("the list of digests is too long", hint=CURE)
            self._go_to(len(self._targets))
            self._document = bytearray()
            return
        found = _RANGE.fullmatch(member.name)
        number, offset = (int(found[1], 16), int(found[2], 16)) if found else (len(self._targets), 0)
        if number >= len(self._targets) or number < len(self._digests):
            raise ImageError(f"the archive has an unexpected member {member.name[:80]!r}", hint=CURE)
        self._go_to(number)
        if self._file is None:
            raise AssertionError("a file is open up to the last one")
        self._file.seek(offset, member.size)

    def _go_to(self, number: int) -> None:
        """Finish the files before a file, and open it. Files of zeros have no members."""
        while len(self._digests) < number or (self._file is None and number < len(self._targets)):
            if self._file is None:
                self._file = _File(self._targets[len(self._digests)])
            if len(self._digests) == number:
                return
            self._digests.append(self._file.finish())
            self._file = None

    def _content(self, view: memoryview) -> int:
        """Take the content of a member; return how many bytes that was."""
        if not self._left:
            skipped = min(self._padding, len(view))
            self._padding -= skipped
            return skipped
        taken = view[: self._left]
        self._left -= len(taken)
        if self._document is not None:
            self._document += taken
        elif self._file is not None:
            self._file.take(taken)
        return len(taken)


class _File:
    """One file that arrives."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._digest = hashlib.sha256()
        self._at = self._taken = 0
        self._fd: int | None = None
        if target.path is not None:
            with os_errors(f"make {target.path}"):
                self._fd = os.open(target.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                os.ftruncate(self._fd, target.file.size_bytes)

    def seek(self, offset: int, length: int) -> None:
        """Go to the next range."""
        self._taken += length
        file = self._target.file
        if offset < self._at or offset + length > file.size_bytes or self._taken > file.data_bytes:
            raise ImageError(f"{file.path} in the archive has other ranges than its manifest allows", hint=CURE)
        add_zeros(self._digest, offset - self._at)
        self._at = offset

    def take(self, data: memoryview) -> None:
        """Take bytes of the current range."""
        self._digest.update(data)
        if self._fd is not None:
            with os_errors(f"write {self._target.path}"):
                write_all(self._fd, data, self._at)
        self._at += len(data)

    def finish(self) -> str:
        """Make the file durable and read-only. Return its SHA-256."""
        add_zeros(self._digest, self._target.file.size_bytes - self._at)
        if self._fd is not None:
            with os_errors(f"sync {self._target.path}"):
                os.fchmod(self._fd, IMMUTABLE)
                os.fsync(self._fd)
            self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
