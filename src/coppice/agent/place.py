"""Where a copy goes, by the rules of `cp -r` and `docker cp`.

Both directions use the same rules. They differ in how a path is looked up.
"""

from __future__ import annotations

import posixpath
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from coppice.errors import NotFound, UsageError

Look = Callable[[str, bool], Awaitable[str | None]]
"""Returns the kind of a path (`f`, `d`, `l`, ...), following a last link or not.

None means that the path does not exist, or that a parent is not a directory.
"""


_REPLACED = (None, "d", "l", "f")


class Place(NamedTuple):
    """A directory and the name of the copy in it; None puts the source's contents into it."""

    directory: str
    name: str | None


def is_contents(source: str) -> bool:
    """Return whether a path names the contents of a directory: `dir/.`, `.`, `..` and `/`."""
    return posixpath.basename(source.rstrip("/")) in ("", ".", "..")


async def place(source: str, kind: str, destination: str, look: Look, make: str) -> Place:
    """Return where the copy of `source` goes.

    :param kind: the kind of the source, as `Look` returns it
    :param make: the command that makes a directory on the destination's side, for the hint
    :raises NotFound: the directory to copy into does not exist
    :raises UsageError: a directory would replace a file, a file a directory, or anything a device
    """
    found = await look(destination, True)
    if found == "d":
        if kind == "d" and is_contents(source):
            return Place(destination, None)
        name = posixpath.basename(source.rstrip("/"))
        if name in ("", ".", ".."):
            raise UsageError(f"{source} has no name for its copy", hint="give the new name as the destination")
        await _require_fit(source, kind, posixpath.join(destination, name), look)
        return Place(destination, name)
    _require_replaceable(destination, found)  # also behind a link, as /dev/stdout is
    bare = destination.rstrip("/") or "/"
    directory, name = posixpath.split(bare)
    directory = directory or "."
    if bare != destination or name in ("", ".", ".."):
        if await look(bare, True) is not None:
            raise UsageError(f"{bare} is not a directory", hint=f"write {bare} without a slash to replace it")
        if kind != "d" or name in ("", ".", ".."):
            raise _no_directory(make, destination)
    await _require_fit(source, kind, bare, look)
    if await look(directory, True) != "d":
        raise _no_directory(make, directory)
    return Place(directory, name)


def _no_directory(make: str, directory: str) -> NotFound:
    return NotFound(f"the directory {directory} does not exist", hint=f"make it first: `{make} {directory}`")


def _require_replaceable(target: str, kind: str | None) -> None:
    if kind not in _REPLACED:  # such as /dev/null, which all programs of that machine would lose
        raise UsageError(
            f"{target} is a device, a pipe or a socket, and a copy would replace it",
            hint="give the name of a file; `coppice exec NAME -- cat PATH` prints a file",
        )


async def _require_fit(source: str, kind: str, target: str, look: Look) -> None:
    """Refuse to replace anything else by a directory, and a directory or a device by anything else."""
    there = await look(target, False)
    _require_replaceable(target, there)
    if kind == "d" and there not in (None, "d"):
        raise UsageError(f"{target} is not a directory, and {source} is", hint="remove it, or give another name")
    if kind != "d" and there == "d":
        raise UsageError(f"{target} is a directory, and {source} is not", hint="remove it, or give another name")
