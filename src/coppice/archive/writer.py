"""Write an archive, as pieces of a stream. Blocks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from coppice import stopping
from coppice.archive.format import (
    BLOCK,
    DIGESTS,
    MANIFEST,
    ArchivedFile,
    Digests,
    Manifest,
    add_zeros,
    document,
    header,
    name_of_range,
    padding,
)
from coppice.errors import IntegrityError
from coppice.linux.clone import nonzero_parts, open_source
from coppice.linux.extents import data_ranges
from coppice.linux.files import os_errors
from coppice.model import MIB

_CHUNK = MIB
_CURE = "run `coppice verify`, which names what was changed"


class Source(NamedTuple):
    """A file to be archived."""

    path: Path
    file: ArchivedFile
    sha256: str | None = None  # what it must be, if that is known


def source_of(path: Path, name: str, sha256: str | None = None) -> Source:
    """Return a file with its sizes, which needs no reading of it.

    :raises IntegrityError: the file is missing
    """
    with os_errors(f"archive {path}"), open_source(path) as fd:
        size = os.fstat(fd).st_size
        data = sum(length for _, length in data_ranges(fd, size))
    return Source(path, ArchivedFile(path=name, size_bytes=size, data_bytes=data), sha256)


def archive(manifest: Manifest, sources: Sequence[Source]) -> Iterator[bytes]:
    """Yield the bytes of an archive, about a MiB at a time.

    :raises IntegrityError: a file was changed since the manifest was made, or since its digest was recorded
    """
    pieces: list[bytes] = []
    gathered = 0
    for piece in _pieces(manifest, sources):
        stopping.check()
        pieces.append(piece)
        gathered += len(piece)
        if gathered >= _CHUNK:
            yield b"".join(pieces)
            pieces, gathered = [], 0
    yield b"".join(pieces)


def _pieces(manifest: Manifest, sources: Sequence[Source]) -> Iterator[bytes]:
    yield document(MANIFEST, manifest)
    digests: list[str] = []
    for number, source in enumerate(sources):
        digest = hashlib.sha256()
        yield from _ranges(number, source, digest)
        digests.append(digest.hexdigest())
        if source.sha256 not in (None, digests[-1]):
            raise IntegrityError(f"{source.path} has changed: its SHA-256 is not the recorded one", hint=_CURE)
    yield document(DIGESTS, Digests(sha256=tuple(digests)))
    yield bytes(2 * BLOCK)


def _ranges(number: int, source: Source, digest: hashlib._Hash) -> Iterator[bytes]:
    """Yield a member for each run of data of a file, without its blocks of zeros."""
    size, done = source.file.size_bytes, 0
    with os_errors(f"archive {source.path}"), open_source(source.path) as fd:
        for start, length in data_ranges(fd, size):
            add_zeros(digest, start - done)
            done = start
            while done < start + length:
                chunk = os.pread(fd, min(_CHUNK, start + length - done), done)
                digest.update(chunk)
                for offset, part in nonzero_parts(chunk):
                    yield header(name_of_range(number, done + offset), len(part))
                    yield bytes(part)
                    yield padding(len(part))
                done += len(chunk)
                if not chunk:
                    break
        add_zeros(digest, size - done)
        if os.fstat(fd).st_size != size:
            raise IntegrityError(f"{source.path} has changed while it was archived", hint=_CURE)
