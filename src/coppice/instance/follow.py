"""A log file, line by line, as it grows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import BinaryIO

_POLL_S = 0.1  # a regular file has no event of its growth but inotify, which asyncio does not speak
_CHUNK = 1 << 16
_LINE_MAX = 1 << 20  # what the guest writes without a line end is handed on in pieces of about this size


async def follow_file(
    path: Path, *, tail: int | None, follow: bool, ended: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """Yield lines without their line ends: the last `tail` (None: all), then, with `follow`, new ones until `ended` says so."""
    with path.open("rb") as stream:
        if tail is not None:
            await asyncio.to_thread(_seek_tail, stream, tail)
        rest = b""
        over = not follow
        while True:
            while chunk := await asyncio.to_thread(stream.read, _CHUNK):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line
                if len(rest) >= _LINE_MAX:
                    yield rest
                    rest = b""
            if over:
                break
            over = await ended()  # asked before the last read: what is written before the end is still read
            if not over:
                await asyncio.sleep(_POLL_S)
        if rest:
            yield rest


def _seek_tail(stream: BinaryIO, lines: int) -> None:
    """Go to where the last `lines` lines begin, a last one without a line end included, reading backwards in pieces."""
    end = position = stream.seek(0, os.SEEK_END)
    if not lines:
        return
    wanted = lines
    while position:
        begin = max(0, position - _CHUNK)
        stream.seek(begin)
        chunk = stream.read(position - begin)
        if position == end and chunk.endswith(b"\n"):
            wanted += 1  # the line end of the last line is no beginning of another
        at = len(chunk)
        while (at := chunk.rfind(b"\n", 0, at)) >= 0:
            wanted -= 1
            if not wanted:
                stream.seek(begin + at + 1)
                return
        position = begin
    stream.seek(0)
