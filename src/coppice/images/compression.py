"""Decompress hostile streams: bounded memory, every trailer checked, truncation distinguished from
the end.

The four formats share one incremental interface. Input is fed one kilobyte at a time. No format
expands that beyond about 32 MiB (a zstd RLE block is the worst: 4 bytes for 128 KiB), so a
decompression bomb hits the caller's limit before memory runs out.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

from coppice.errors import ImageError
from coppice.model import MIB

MAGIC_BYTES = 6
_SLICE = 1024
_LZMA_MEMORY = 256 * MIB  # xz -9 needs 65 MiB
_ZSTD_WINDOW = 128 * MIB  # zstd's own limit without --long
_FAILURES = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError, EOFError)


class _Stream(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _gzip() -> _Stream:
    return zlib.decompressobj(wbits=31)


def _xz() -> _Stream:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)


def _zstd() -> _Stream:
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


_FORMATS: tuple[tuple[bytes, str, Callable[[], _Stream]], ...] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"\xfd7zXZ\0", "xz", _xz),
    (b"BZh", "bzip2", bz2.BZ2Decompressor),
)


def is_compressed(beginning: bytes) -> bool:
    """Return whether a file with this beginning is in one of the formats. Six bytes are enough."""
    return any(beginning.startswith(magic) for magic, _, _ in _FORMATS)


class Decompressor:
    """One stream, recognised by its first bytes.

    Data in no known format passes through unchanged.
    """

    def __init__(self, beginning: bytes) -> None:
        self._name = "plain"
        self._open: Callable[[], _Stream] | None = None
        for magic, name, opener in _FORMATS:
            if beginning.startswith(magic):
                self._name, self._open = name, opener
        self._stream = self._open() if self._open else None
        self._padding = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed form of `data`, the next bytes of the stream.

        Raises ImageError if it is corrupt.
        """
        if self._open is None:
            yield data
            return
        for start in range(0, len(data), _SLICE):
            piece = data[start : start + _SLICE]
            while piece:
                plain, piece = self._step(piece)
                if plain:
                    yield plain

    def finish(self) -> None:
        """End the stream. Raises ImageError if it is incomplete."""
        if self._stream is not None and not self._stream.eof:
            raise ImageError(f"the {self._name} stream is truncated", hint="fetch or make the archive again")

    def _step(self, piece: bytes) -> tuple[bytes, bytes]:
        """Feed the current member of the stream; return its plain bytes, and the input for the next
        member.
        """
        assert self._open is not None  # noqa: S101 - feed() has checked it
        assert self._stream is not None  # noqa: S101
        if self._stream.eof:
            # Streams of all formats can be concatenated; tapes and xz pad with zeros between and
            # after them.
            piece = piece.lstrip(b"\0")
            if not piece:
                return b"", b""
            self._stream = self._open()
        try:
            plain = self._stream.decompress(piece)
        except _FAILURES as error:
            raise ImageError(
                f"the {self._name} stream is corrupt: {error}", hint="fetch or make the archive again"
            ) from error
        return plain, self._stream.unused_data if self._stream.eof else b""
