"""Read a log file line by line while it grows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import BinaryIO

_POLL_S = 0.1  # only inotify reports growth of a regular file, and asyncio has no support for it
_CHUNK = 1 << 16
_LINE_MAX = 1 << 20  # longer lines of a guest are split into pieces of about this size


async def follow_file(
    stream: BinaryIO, *, tail: int | None, follow: bool, ended: Callable[[], Awaitable[bool]]
) -> AsyncGenerator[bytes, None]:
    """Yield the lines of an open file without their line ends.

    :param tail: the number of last lines to begin with; None for all
    :param follow: then yield new lines until `ended` returns true
    """
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
        over = await ended()  # before the last read, which gets everything written before the end
        if not over:
            await asyncio.sleep(_POLL_S)
    if rest:
        yield rest


def _seek_tail(stream: BinaryIO, lines: int) -> None:
    """Seek to the beginning of the last `lines` lines, reading backwards in pieces.

    A last line without a line end counts.
    """
    end = position = stream.seek(0, os.SEEK_END)
    if not lines:
        return
    wanted = lines
    while position:
        begin = max(0, position - _CHUNK)
        stream.seek(begin)
        chunk = stream.read(position - begin)
        if position == end and chunk.endswith(b"\n"):
            wanted += 1  # no line begins after the last line end
        at = len(chunk)
        while (at := chunk.rfind(b"\n", 0, at)) >= 0:
            wanted -= 1
            if not wanted:
                stream.seek(begin + at + 1)
                return
        position = begin
    stream.seek(0)
