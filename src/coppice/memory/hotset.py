"""Which pages of a mem-file its forks touch until they are ready, so that a cold page cache is filled in one go and not fault by fault.

A guest that has just been restored touches some MiB here and there. With a cold cache each touch waits for the disk by itself. So the ranges that the
first fork had in its page tables when it was ready are kept beside the mem-file, and the next ones are read ahead while their VMM starts.
It is a hint and nothing else: where it is missing, damaged, or of another mem-file, pages come as they are touched.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from pathlib import Path

from coppice.disk.atomic import os_errors
from coppice.disk.clone import open_source
from coppice.errors import CoppiceError
from coppice.memory.maps import identify, read_maps
from coppice.memory.pagemap import touched_ranges

_MOST_RANGES = 65_535  # one page each would be 256 MiB
_MOST_BYTES = 8 * (1 + 2 * _MOST_RANGES)


def record(pid: int, memory: Path, hot: Path) -> None:
    """Keep in `hot` what the process has touched of the mem-file `memory`, unless that is there already. Blocks for a few milliseconds.

    The file is the inode of the mem-file, then offset and length in bytes of each range, as 64-bit numbers. It is not synced. Where it cannot be
    had, nothing is kept and nothing is raised.
    """
    if _read(memory, hot):
        return
    with contextlib.suppress(OSError, CoppiceError):
        identity = identify(memory)
        ranges = touched_ranges(pid, [vma for vma in read_maps(pid) if vma.file == identity])
        if not ranges:
            return
        content = array(
            "Q",
            [
                memory.lstat().st_ino,
                *(number for item in ranges[:_MOST_RANGES] for number in (item.offset, item.length)),
            ],
        )
        hot.unlink(missing_ok=True)
        descriptor = os.open(hot, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o444)
        try:
            os.write(descriptor, content.tobytes())
        finally:
            os.close(descriptor)


def prefetch(memory: Path, hot: Path) -> int:
    """Have the kernel read what `hot` names of the mem-file into the page cache; return how many bytes that are.

    What is cached already is only looked up: 0.4 ms for 20 MiB. Reading goes on after the return; nothing is raised.
    """
    total = 0
    with contextlib.suppress(OSError, CoppiceError), os_errors(f"read {memory}"), open_source(memory) as descriptor:
        for offset, length in _read(memory, hot):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
            total += length
    return total


def _read(memory: Path, hot: Path) -> list[tuple[int, int]]:
    """The ranges of the record, none where it is not of this mem-file."""
    with contextlib.suppress(OSError, TypeError, ValueError, CoppiceError), open_source(hot) as descriptor:
        inode, *numbers = memoryview(os.read(descriptor, _MOST_BYTES)).cast("Q")
        status = memory.lstat()
        ranges = list(zip(numbers[::2], numbers[1::2], strict=True))
        if inode == status.st_ino and all(offset + length <= status.st_size for offset, length in ranges):
            return ranges
    return []
