"""A log file, line by line, as it grows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

_POLL_S = 0.1  # a regular file has no event of its growth but inotify, which asyncio does not speak
_CHUNK = 1 << 16


async def follow_file(
    path: Path, *, tail: int | None, follow: bool, ended: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """Yield lines without their line ends: the last `tail` (None: all), then, with `follow`, new ones until `ended` says so."""
    with path.open("rb") as stream:
        lines = await asyncio.to_thread(_last_lines, stream.read, tail)
        rest = b"" if not lines else lines.pop()
        for line in lines:
            yield line
        while follow:
            over = await ended()  # asked before the read: what is written before the end is still read
            while chunk := await asyncio.to_thread(stream.read, _CHUNK):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line
            if over:
                break
            await asyncio.sleep(_POLL_S)
        if rest:
            yield rest


def _last_lines(read: Callable[[int], bytes], tail: int | None) -> list[bytes]:
    """Whole lines, and as last element what follows the last line end. Memory is bounded by the lines that are asked for."""
    kept: deque[bytes] = deque(maxlen=None if tail is None else tail + 1)
    rest = b""
    while chunk := read(_CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        kept.extend(whole)
    if tail is not None and len(kept) > tail:
        kept.popleft()
    return [*kept, rest]
