"""Packing, on the host, a tree for a guest. All functions block."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from coppice.agent.records import CONTENT_MAX, UNSIZED_MAX, Content, End, Entry, Item, Kind
from coppice.linux.extents import data_ranges

_KINDS: Final[dict[int, Kind]] = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
}
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def content_bytes(source: Path) -> int:
    """Return the size of a tree's readable files. A file with several names counts once."""
    inside = () if source.is_symlink() else os.walk(source)
    below = (f"{directory}/{name}" for directory, _, names in inside for name in names)
    sizes: dict[tuple[int, int], int] = {}
    for path in itertools.chain([str(source)], below):
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def pack(
    source: Path,
    name: str | None,
    *,
    owner: tuple[int, int] | None = (0, 0),
    moved: Callable[[int], None] = lambda _: None,
    wanted: Callable[[Entry], bool] = lambda _: True,
) -> Iterator[Item]:
    """Yield a file or tree, whose entries all lie below `name`.

    The content of a file is what can be read. A file that grows is read up to the size that it had;
    one that shrinks is an error.

    :param name: None yields the contents of the directory without the directory itself
    :param owner: UID and GID of all entries; None keeps those that the files have here
    :param moved: called with each number of content bytes yielded
    :param wanted: returns whether to yield an entry; without a directory's, its contents are left out
    :raises OSError: a file cannot be read
    """
    first: dict[tuple[int, int], str] = {}
    waiting = [(os.fspath(source), name)] if name is not None else _below(os.fspath(source), "")
    while waiting:
        path, inside = waiting.pop()
        status = os.lstat(path)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:  # a socket is useless without the process that made it
            continue
        link = str(Path(path).readlink()) if kind == "l" else ""
        if kind != "d" and (known := first.get((status.st_dev, status.st_ino))) is not None:
            link, kind = known, "h"
        entry = Entry(
            inside,
            kind,
            stat.S_IMODE(status.st_mode),
            *(owner or (status.st_uid, status.st_gid)),
            status.st_mtime_ns,
            link,
            (os.major(status.st_rdev), os.minor(status.st_rdev)),
        )
        if not wanted(entry):
            continue
        if kind not in ("d", "h") and status.st_nlink > 1:
            first[status.st_dev, status.st_ino] = inside
        if kind == "f":
            yield from _file(path, entry, moved)
            continue
        yield entry
        if kind == "d":
            waiting += _below(path, f"{inside}/")


def _below(directory: str, prefix: str) -> list[tuple[str, str]]:
    with os.scandir(directory) as entries:
        names = sorted((entry.name for entry in entries), reverse=True)
    return [(f"{directory}/{name}", prefix + name) for name in names]


def _file(path: str, entry: Entry, moved: Callable[[int], None]) -> Iterator[Item]:
    fd = os.open(path, _FLAGS)
    try:
        status = os.fstat(fd)
        size = status.st_size
        if _has_no_size(fd, status):
            yield entry
            end = 0
            for content in _contents(fd, 0, UNSIZED_MAX + 1):
                end = content.offset + len(content.data)
                if end > UNSIZED_MAX:
                    raise OSError(errno.EFBIG, "its size is unknown, and it has more than 64 MiB", path)
                yield content
            moved(end)
            yield End(end)
            return
        yield entry._replace(size=size)
        done = 0
        for offset, length in data_ranges(fd, size):
            moved(offset - done)
            done = offset
            for content in _contents(fd, offset, length):
                yield content
                moved(len(content.data))
                done += len(content.data)
            if done < offset + length:
                raise _shorter(path)
        if os.fstat(fd).st_size < size:  # a hole up to the end looks alike
            raise _shorter(path)
        moved(size - done)
        yield End(size)
    finally:
        os.close(fd)


def _has_no_size(fd: int, status: os.stat_result) -> bool:
    """Return whether the file system only makes up the size."""
    if status.st_size == 0 or status.st_blocks:
        return status.st_size == 0
    try:
        return os.lseek(fd, 0, os.SEEK_DATA) == 0
    except OSError:
        return False


def _contents(fd: int, offset: int, length: int) -> Iterator[Content]:
    """Yield what can be read of a range; less than the range at the end of the file."""
    end = offset + length
    while offset < end and (data := os.pread(fd, min(CONTENT_MAX, end - offset), offset)):
        yield Content(offset, data)
        offset += len(data)


def _shorter(path: str) -> OSError:
    return OSError(errno.EIO, "the file has become shorter while it was read", path)
