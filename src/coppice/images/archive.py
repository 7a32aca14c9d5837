"""Tar archives from outside: opened, decompressed if necessary, indexed, and read again.

The standard library parses the headers. This module checks what it takes on trust: that reading
moves forward, that no extended header is huge, and that the archive really ends where the parser
stops.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from coppice.errors import ImageError, UsageError
from coppice.images.compression import MAGIC_BYTES, Decompressor, is_compressed
from coppice.images.workspace import CHUNK, Workspace

BLOCK = tarfile.BLOCKSIZE
_MAX_DIGITS = 4096
# Exceptions that the standard library's parser raises on invalid headers: its own, and those of
# int(), struct and slicing.
_PARSER_FAILURES = (tarfile.TarError, ValueError, OverflowError, IndexError, KeyError, EOFError, RecursionError)
_CURE = "fetch or make the archive again"


def open_regular(path: Path) -> BinaryIO:
    """Open a user's file for reading.

    Raises UsageError if it is missing, ImageError if it is a device or a fifo.
    """
    try:
        # Without O_NONBLOCK, opening a fifo would block forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} does not exist", hint="check the path") from error
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(f"{path} is not a regular file", hint="give an archive, or an OCI layout directory")
    return os.fdopen(descriptor, "rb")


def copy_decompressed(source: IO[bytes], workspace: Workspace, *, total: int | None = None) -> IO[bytes]:
    """Return the plain bytes of `source` in a new file of the workspace.

    Raises ImageError if it is corrupt, truncated or too large.
    """
    plain_file = workspace.new_file()
    done = 0
    beginning = source.read(MAGIC_BYTES)
    decompressor, data = Decompressor(beginning), beginning
    while data:
        for plain in decompressor.feed(data):
            workspace.spend(len(plain))
            plain_file.write(plain)
        done += len(data)
        workspace.report("unpack", done, total)
        data = source.read(CHUNK)
    decompressor.finish()
    plain_file.seek(0)
    return plain_file


class _GuardedFile(io.BufferedIOBase):
    """The file below a TarFile. It refuses reads that only a hostile header causes."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.parsing = True

    def read(self, size: int | None = -1, /) -> bytes:
        # tarfile reads a whole extended header at once, and everything if the size is negative
        # (CVE-2025-8194).
        if size is None or not 0 <= size <= CHUNK:
            raise ImageError("the archive has an extended header that is too large", hint=_CURE)
        data = self._file.read(size)
        # A long run of digits makes the parser of unpatched Pythons quadratic while it holds the
        # GIL (CVE-2024-6232).
        if self.parsing and size > BLOCK and any(len(run) > _MAX_DIGITS for run in re.findall(rb"\d+", data)):
            raise ImageError("the archive has an extended header with too many digits", hint=_CURE)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:  # beyond the largest file offset
            raise ImageError("the archive has a header that points outside the archive", hint=_CURE) from error

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class Archive:
    """An uncompressed tar archive, with its members in order."""

    def __init__(self, file: IO[bytes], workspace: Workspace, *, must_end: bool) -> None:
        """Read all headers.

        With `must_end`, a missing end-of-archive block means truncation, for archives without a
        digest.

        Raises ImageError if it is not a well-formed archive, or has too many members.
        """
        self._guard = _GuardedFile(file)
        try:
            self._tar = tarfile.open(  # noqa: SIM115 - it owns nothing: the workspace closes the file
                fileobj=self._guard, mode="r:", encoding="utf-8", errors="surrogateescape"
            )
            self.members = list(self._index(workspace))
            self._guard.parsing = False
            self._check_end(file, must_end=must_end)
        except _PARSER_FAILURES as error:
            raise ImageError(f"the tar archive is corrupt or truncated: {error}", hint=_CURE) from error

    def _index(self, workspace: Workspace) -> Iterator[tarfile.TarInfo]:
        position = -1
        for member in self._tar:
            if member.offset <= position or member.size < 0 or member.offset_data < member.offset:
                raise ImageError("the tar archive has a header that points backwards", hint="do not trust it")
            position = member.offset
            extended = sum(len(value) for value in member.pax_headers.values())
            workspace.spend_member(len(member.name) + len(member.linkname) + extended)
            yield member

    def _check_end(self, file: IO[bytes], *, must_end: bool) -> None:
        # TarFile stops at the first header that it cannot read. It reports this only for the very
        # first header.
        file.seek(self._tar.offset)
        end = file.read(BLOCK)
        if end == bytes(BLOCK) or (end == b"" and not must_end and self.members):
            return
        raise ImageError("the tar archive ends without its end mark: it is corrupt or truncated", hint=_CURE)

    def content(self, member: tarfile.TarInfo) -> TarContent:
        """Return the bytes of a regular file."""
        return TarContent(self, member)

    def open(self, member: tarfile.TarInfo) -> IO[bytes]:
        """Return a file to read the member from, in pieces of at most CHUNK."""
        file = self._tar.extractfile(member)
        if file is None:
            raise ImageError(f"the archive's {member.name[:200]!r} is not a file", hint=_CURE)
        return file


@dataclass(slots=True, frozen=True)
class TarContent:
    """The content of a regular file inside its archive. Holes of sparse members read as zeros."""

    archive: Archive
    member: tarfile.TarInfo

    @property
    def size(self) -> int:
        """Length in bytes, holes included."""
        return self.member.size

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield exactly `length` bytes from `offset`.

        Raises ImageError if the archive ends earlier.
        """
        with self.archive.open(self.member) as file:
            try:
                file.seek(offset)
                while length:
                    data = file.read(min(CHUNK, length))
                    if not data:
                        raise ImageError(f"the archive ends within {self.member.name[:200]!r}", hint=_CURE)
                    length -= len(data)
                    yield data
            except _PARSER_FAILURES as error:
                raise ImageError(f"the archive's {self.member.name[:200]!r} is corrupt", hint=_CURE) from error


def open_archive(path: Path, workspace: Workspace) -> Archive:
    """Return the tar archive at `path`: plain, or compressed by gzip, zstd, xz or bzip2.

    Raises UsageError if there is no such file, else ImageError.
    """
    file = workspace.closing.enter_context(open_regular(path))
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ImageError(f"{path} is empty", hint=_CURE)
    beginning = file.read(MAGIC_BYTES)
    file.seek(0)
    plain: IO[bytes] = copy_decompressed(file, workspace, total=size) if is_compressed(beginning) else file
    return Archive(plain, workspace, must_end=True)
