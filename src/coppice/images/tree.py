"""A root file system held as a tree in memory: what layers are applied to, and what the image writers read.

Layers never touch the host's file system. So no member path, hard link or symlink can lead outside of the root,
whatever it says; owners, devices and xattrs need no privilege; and the order in which an archive lists its members does
not show in the image. The bytes of files stay in their archives until they are written.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from coppice.errors import ImageError, UnsafePath

MAX_PATH = 4096
MAX_COMPONENT = 255
MAX_DEPTH = MAX_PATH // 2
MAX_FOLLOWED = 40  # the kernel's own limit on symlinks in one path (path_resolution(7))

Path = tuple[bytes, ...]


class Content(Protocol):
    """The bytes of one regular file, readable as often as needed."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Exactly `length` bytes from `offset`, in pieces. Raises ImageError where they are not there."""


@dataclass(slots=True)
class Bytes:
    """Content that is small and already here."""

    data: bytes

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.data)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """One piece."""
        yield self.data[offset : offset + length]


@dataclass(slots=True, eq=False)
class Node:
    """One inode. Hard links are the same Node below several names; a directory has only one."""

    mode: int  # file type and permissions, as st_mode
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)  # of a directory
    target: bytes = b""  # of a symlink
    device: tuple[int, int] = (0, 0)  # major, minor
    content: Content | None = None  # of a regular file

    @property
    def is_dir(self) -> bool:
        """Whether this is a directory."""
        return stat.S_ISDIR(self.mode)


def split_path(raw: bytes) -> Path:
    """The components of an archive member's path. A leading `/` means the root of the image, as in all layer tools.

    Raises UnsafePath where it has a `..`, ImageError where the kernel could not have such a name.
    """
    parts = tuple(part for part in raw.split(b"/") if part not in (b"", b"."))
    shown = raw[:200].decode("utf-8", "backslashreplace")
    if b".." in parts:
        raise UnsafePath(f"the archive has a member {shown!r} that climbs with '..'", hint="do not trust this archive")
    if len(raw) > MAX_PATH or b"\0" in raw or any(len(part) > MAX_COMPONENT for part in parts):
        raise ImageError(f"the archive has a member {shown!r} whose name no file system takes", hint="make it anew")
    return parts


class FileTree:
    """A root directory. Parents are followed as the kernel would inside a chroot: never above the root."""

    def __init__(self, *, max_nodes: int = 1_000_000) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self._nodes_left = max_nodes

    def put(self, path: Path, node: Node) -> None:
        """Place `node` at `path`, with missing parents made. A directory that is there already keeps its children.

        Raises UnsafePath for a root that is no directory, ImageError for a parent that is none or for too many nodes.
        """
        if not path:
            if not node.is_dir:
                raise UnsafePath("the archive would replace the root by something else", hint="do not trust it")
            node.children, self.root = self.root.children, node
            return
        parent = self._make_directory(path[:-1])
        self._count()
        before = parent.children.get(path[-1])
        if before is not None and before.is_dir and node.is_dir:
            node.children = before.children
        parent.children[path[-1]] = node

    def link(self, path: Path, target: Path) -> None:
        """Make `path` a hard link of what `target` is: in this layer or in one below. A symlink there is not followed.

        Raises ImageError where the target is missing or a directory.
        """
        node = self.find(target)
        if node is None or node.is_dir:
            raise ImageError(
                f"{_show(path)} is a hard link to {_show(target)}, which is {'a directory' if node else 'missing'}",
                hint="make the archive anew: it is incomplete, or its members are in the wrong order",
            )
        self.put(path, node)

    def find(self, path: Path) -> Node | None:
        """What is at `path`, parents followed inside the root, the last component not. None where nothing is."""
        parent = self._walk(path[:-1], make=False)
        if not path or parent is None:
            return parent
        return parent.children.get(path[-1])

    def remove(self, path: Path) -> bool:
        """Remove `path` with all below it; whether there was anything."""
        parent = self._walk(path[:-1], make=False)
        return bool(path) and parent is not None and parent.children.pop(path[-1], None) is not None

    def clear(self, path: Path) -> None:
        """Empty the directory at `path` (an opaque one hides what lower layers have in it). Nothing there is fine."""
        directory = self._walk(path, make=False)
        if directory is not None:
            directory.children.clear()

    def ensure_directory(self, path: Path, mode: int = 0o755) -> None:
        """Make the directory, unless anything goes by that name already."""
        if self.find(path) is None:
            self.put(path, Node(stat.S_IFDIR | mode))

    def walk(self) -> Iterator[tuple[Node, bytes, Node]]:
        """Every name in the tree as (directory, name, node): parents first, siblings in byte order. Not the root
        itself.

        A linked node comes once for each of its names.
        """
        pending = [(self.root, name, self.root.children[name]) for name in sorted(self.root.children, reverse=True)]
        while pending:
            parent, name, node = pending.pop()
            yield parent, name, node
            pending.extend((node, below, node.children[below]) for below in sorted(node.children, reverse=True))

    def _make_directory(self, path: Path) -> Node:
        directory = self._walk(path, make=True)
        if directory is None:
            raise ImageError(f"{_show(path)} is used as a directory, but is none", hint="make the archive anew")
        return directory

    def _walk(self, path: Iterable[bytes], *, make: bool) -> Node | None:
        """The directory at `path`; None where it is not one or, unless it may be made, where it is missing."""
        trail = [self.root]
        pending = list(path)[::-1]
        followed = 0
        while pending:
            name = pending.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                del trail[max(1, len(trail) - 1) :]
                continue
            child = trail[-1].children.get(name)
            if child is None:
                if not make:
                    return None
                self._count()
                child = trail[-1].children[name] = Node(stat.S_IFDIR | 0o755)
            if stat.S_ISLNK(child.mode):
                followed += 1
                if followed > MAX_FOLLOWED:
                    raise UnsafePath("a member's parent directories are a loop of symlinks", hint="do not trust it")
                if child.target.startswith(b"/"):
                    del trail[1:]
                pending.extend(reversed(child.target.split(b"/")))
            elif child.is_dir:
                trail.append(child)
                if len(trail) > MAX_DEPTH:
                    raise ImageError("the archive nests directories absurdly deep", hint="do not trust it")
            else:
                return None
        return trail[-1]

    def _count(self) -> None:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise ImageError(
                "the archive has more members than are allowed",
                hint="make it smaller; if it should be small, do not trust it",
            )


def _show(path: Path) -> str:
    return repr("/" + b"/".join(path)[:200].decode("utf-8", "backslashreplace"))
