"""Unpacking, on the host, a tree from a guest. All functions block.

The guest is hostile. Nothing is written through a link or outside the destination, no device is
made, and memory use is bounded.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from coppice.agent.records import Content, End, Entry, Item
from coppice.errors import GuestProtocolError, NoSpace, UnsafePath

_DEPTH_MAX = 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Budget:
    """The limit of bytes to write (None: no limit), and the callback `moved` for those received."""

    def __init__(self, limit: int | None, moved: Callable[[int], None]) -> None:
        self._limit = limit
        self.moved = moved
        self.used = 0

    def spend(self, size: int) -> None:
        """Account for `size` bytes.

        :raises NoSpace: the limit is exceeded
        """
        self.used += size
        if self._limit is not None and self.used > self._limit:
            raise NoSpace(f"the guest sends more than {self._limit} bytes", hint="raise the limit, or copy less")


def unpack(
    items: Iterator[Item],
    parent: Path,
    name: str | None,
    *,
    max_bytes: int | None = None,
    outside_links: bool = False,
    moved: Callable[[int], None] = lambda _: None,
) -> int:
    """Unpack a tree that has one top directory or file, as `parent`/`name`.

    Without a name, the contents of the top directory go into `parent`, whose mode is kept. Owners,
    set-id bits and write permission for group and others are not restored.

    :param outside_links: make symbolic links that lead out of the tree too; unpacking follows none of them
    :param moved: called with each number of content bytes received
    :return: the bytes of contents
    :raises UnsafePath: an entry is outside the destination, or not a file, directory or link
    :raises GuestProtocolError: as `items`
    :raises NoSpace: the contents exceed `max_bytes`
    """
    budget = Budget(max_bytes, moved)
    root = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    entered: list[tuple[list[str], int]] = []  # directories around the present entry, with their times
    try:
        for entry in items:
            if not isinstance(entry, Entry):
                raise GuestProtocolError("the guest sent content without a file", hint="try again")
            place = _Place(root, name, parts_of(entry.path), outside_links)
            if not (parts := place.renamed(place.parts)):
                if entry.kind != "d":
                    raise UnsafePath(f"the guest sends {entry.path[:200]!r}, which is not a directory", hint=_HINT)
                continue
            _leave(root, entered, parts)
            with _parent(root, parts) as (directory, base):
                _make(items, budget, directory, base, entry, place)
            if entry.kind == "d":
                entered.append((parts, entry.mtime_ns))
        _leave(root, entered, [])
    finally:
        os.close(root)
    return budget.used


def _leave(root: int, entered: list[tuple[list[str], int]], following: list[str]) -> None:
    """Set the times of the directories that do not contain the following entry.

    Making a file changes the time of its directory, so a directory's time is set when its files are there.
    """
    while entered and following[: len(entered[-1][0])] != entered[-1][0]:
        parts, mtime_ns = entered.pop()
        with _parent(root, [*parts, "."]) as (directory, _):
            os.utime(directory, ns=(mtime_ns, mtime_ns))


class _Place(NamedTuple):
    root: int
    name: str | None  # replaces the tree's first path component; None removes it
    parts: list[str]
    outside_links: bool

    def renamed(self, parts: list[str]) -> list[str]:
        """Return the path below `root` of an entry of the tree."""
        return parts[1:] if self.name is None else [self.name, *parts[1:]]


def parts_of(name: str) -> list[str]:
    """Return the components of a path in a tree.

    :raises UnsafePath: it is not below the top of the tree
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or not parts or ".." in parts or "\0" in name or len(parts) > _DEPTH_MAX:
        raise UnsafePath(f"the guest sends {name[:200]!r}, which is outside the destination", hint=_HINT)
    return parts


_HINT = "get the unchanged tree as an archive with `coppice cp NAME:PATH -`"
_LINK_HINT = "make such links with `coppice cp --outside-links NAME:PATH DST`, if no program follows them; or " + _HINT


@contextlib.contextmanager
def _parent(root: int, parts: list[str]) -> Iterator[tuple[int, str]]:
    """Open the directory of the last part, following no links and making missing directories."""
    directory = os.dup(root)
    try:
        for part in parts[:-1]:
            try:
                inner = os.open(part, _DIRECTORY, dir_fd=directory)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=directory)
                inner = os.open(part, _DIRECTORY, dir_fd=directory)
            except OSError as error:
                raise UnsafePath(f"the guest sends {'/'.join(parts)!r} through a link", hint=_HINT) from error
            os.close(directory)
            directory = inner
        yield directory, parts[-1]
    finally:
        os.close(directory)


def _make(items: Iterator[Item], budget: Budget, directory: int, base: str, entry: Entry, place: _Place) -> None:
    if entry.kind == "d":
        with contextlib.suppress(FileExistsError):
            os.mkdir(base, dir_fd=directory)
        inner = os.open(base, _DIRECTORY, dir_fd=directory)
        os.fchmod(inner, entry.mode & 0o755 | 0o700)
        os.close(inner)
        return
    _clear(directory, base)
    if entry.kind == "f":
        _write(items, budget, directory, base, entry)
    elif entry.kind == "l":
        if "\0" in entry.link or not (place.outside_links or stays_inside(entry.link, len(place.parts) - 1)):
            raise UnsafePath(
                f"the guest sends {entry.path[:200]!r}, a link to {entry.link[:200]!r} outside the copy",
                hint=_LINK_HINT,
            )
        os.symlink(entry.link, base, dir_fd=directory)
    elif entry.kind == "h":
        target = parts_of(entry.link)
        if target[0] != place.parts[0] or len(target) == 1:
            raise UnsafePath(
                f"the guest sends {entry.path[:200]!r}, a hard link to a file outside the copy", hint=_HINT
            )
        with _parent(place.root, place.renamed(target)) as (source, source_base):
            os.link(source_base, base, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
    else:
        raise UnsafePath(f"the guest sends {entry.path[:200]!r}, which is a device or a pipe", hint=_HINT)


def _clear(directory: int, base: str) -> None:
    """Remove the file or link that an entry replaces.

    :raises UnsafePath: a device, a pipe or a socket of this host has its name
    """
    try:
        mode = os.lstat(base, dir_fd=directory).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
        raise UnsafePath(f"the guest sends {base[:200]!r} in place of a device, a pipe or a socket", hint=_HINT)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(base, dir_fd=directory)


def stays_inside(target: str, depth: int) -> bool:
    """Return whether a link at `depth` directories below the top of the copy stays in the copy.

    The target may go up first, no further than the top, and then only down. Going up after going
    down through another link could end anywhere.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and "\0" not in target and up < depth and ".." not in parts[up:]


def _write(items: Iterator[Item], budget: Budget, directory: int, base: str, entry: Entry) -> None:
    handle = os.open(base, _NEW_FILE, 0o600, dir_fd=directory)
    complete = False
    try:
        end = 0
        for item in items:
            if isinstance(item, Entry):
                break
            reached = item.size if isinstance(item, End) else item.offset + len(item.data)
            budget.spend(reached - end)
            if isinstance(item, End):
                os.ftruncate(handle, reached)
                os.fchmod(handle, entry.mode & 0o755 | 0o600)
                os.utime(handle, ns=(entry.mtime_ns, entry.mtime_ns))
                budget.moved(reached - end)
                complete = True
                return
            if item.data.count(0) < len(item.data):  # else a hole: a sparse file must not fill this disk
                _write_all(handle, item)
            budget.moved(reached - end)
            end = reached
    finally:
        os.close(handle)
        if not complete:  # a part of a file must not pass for the file
            with contextlib.suppress(OSError):
                os.unlink(base, dir_fd=directory)
    raise GuestProtocolError("the guest sent a file without its end", hint="try again")


def _write_all(handle: int, content: Content) -> None:
    offset, data = content
    while data:
        written = os.pwrite(handle, data, offset)
        offset, data = offset + written, data[written:]
