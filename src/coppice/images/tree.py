"""A root file system as a tree in memory. Layers are applied to it, and the image writers read it.

Layers never touch the host's file system. So no member path, hard link or symlink can escape the
root; owners, devices and xattrs need no privilege; and the order of an archive's members does not
affect the image. The bytes of files stay in their archives until they are written.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from coppice import stopping
from coppice.errors import ImageError, UnsafePath

MAX_PATH = 4096
MAX_COMPONENT = 255
MAX_DEPTH = MAX_PATH // 2
MAX_FOLLOWED = 40  # the kernel's own limit on symlinks in one path (path_resolution(7))

Path = tuple[bytes, ...]


class Content(Protocol):
    """The bytes of one regular file, readable any number of times."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield exactly `length` bytes from `offset`, in pieces.

        Raises ImageError if they are missing.
        """


@dataclass(slots=True)
class Bytes:
    """Small content in memory."""

    data: bytes

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.data)

    def chunks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield one piece."""
        yield self.data[offset : offset + length]


@dataclass(slots=True, eq=False)
class Node:
    """One inode. Hard links are several names of the same Node; a directory has only one name."""

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
    """Return the components of an archive member's path.

    A leading `/` means the image's root, as in all layer tools.

    Raises UnsafePath if it has a `..`, ImageError if the kernel could not have such a name.
    """
    parts = tuple(part for part in raw.split(b"/") if part not in (b"", b"."))
    shown = raw[:200].decode("utf-8", "backslashreplace")
    if b".." in parts:
        raise UnsafePath(
            f"the archive has a member {shown!r} whose name contains '..'", hint="do not trust this archive"
        )
    if len(raw) > MAX_PATH or b"\0" in raw or any(len(part) > MAX_COMPONENT for part in parts):
        raise ImageError(f"the archive has a member with the invalid name {shown!r}", hint="make the archive again")
    return parts


class FileTree:
    """A root directory. Parents are resolved as in a chroot: never above the root."""

    def __init__(self, *, max_nodes: int = 1_000_000) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self._nodes_left = max_nodes

    def put(self, path: Path, node: Node) -> None:
        """Place `node` at `path`, making missing parents. An existing directory keeps its children.

        Raises UnsafePath if the root would not be a directory, ImageError if a parent is not one or
        there are too many nodes.
        """
        if not path:
            if not node.is_dir:
                raise UnsafePath(
                    "the archive replaces the root by something other than a directory", hint="do not trust it"
                )
            node.children, self.root = self.root.children, node
            return
        parent = self._make_directory(path[:-1])
        self._count()
        before = parent.children.get(path[-1])
        if before is not None and before.is_dir and node.is_dir:
            node.children = before.children
        parent.children[path[-1]] = node

    def link(self, path: Path, target: Path) -> None:
        """Make `path` a hard link to `target`, in this layer or a lower one.

        A symlink at `target` is not followed.

        Raises ImageError if the target is missing or a directory.
        """
        node = self.find(target)
        if node is None or node.is_dir:
            raise ImageError(
                f"{_show(path)} is a hard link to {_show(target)}, which is {'a directory' if node else 'missing'}",
                hint="make the archive again: it is incomplete, or its members are in the wrong order",
            )
        self.put(path, node)

    def find(self, path: Path) -> Node | None:
        """Return the node at `path`, or None.

        Parents are resolved inside the root; the last component is not followed.
        """
        parent = self._walk(path[:-1], make=False)
        if not path or parent is None:
            return parent
        return parent.children.get(path[-1])

    def remove(self, path: Path) -> bool:
        """Remove `path` and everything below it; return whether it existed."""
        parent = self._walk(path[:-1], make=False)
        return bool(path) and parent is not None and parent.children.pop(path[-1], None) is not None

    def clear(self, path: Path) -> None:
        """Empty the directory at `path`, if it exists. (An opaque whiteout hides the contents from
        lower layers.)
        """
        directory = self._walk(path, make=False)
        if directory is not None:
            directory.children.clear()

    def ensure_directory(self, path: Path, mode: int = 0o755) -> None:
        """Make the directory, unless the name exists already."""
        if self.find(path) is None:
            self.put(path, Node(stat.S_IFDIR | mode))

    def walk(self) -> Iterator[tuple[Node, bytes, Node]]:
        """Yield every name in the tree as (directory, name, node), except the root.

        Parents come first, siblings in byte order. A linked node comes once per name.
        """
        pending = [(self.root, name, self.root.children[name]) for name in sorted(self.root.children, reverse=True)]
        while pending:
            stopping.check()
            parent, name, node = pending.pop()
            yield parent, name, node
            pending.extend((node, below, node.children[below]) for below in sorted(node.children, reverse=True))

    def _make_directory(self, path: Path) -> Node:
        directory = self._walk(path, make=True)
        if directory is None:
            raise ImageError(f"{_show(path)} is used as a directory, but is not one", hint="make the archive again")
        return directory

    def _walk(self, path: Iterable[bytes], *, make: bool) -> Node | None:
        """Return the directory at `path`, or None if it is not a directory, or missing and not to
        be made.
        """
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
                    raise UnsafePath("a member's parent directories form a loop of symlinks", hint="do not trust it")
                if child.target.startswith(b"/"):
                    del trail[1:]
                pending.extend(reversed(child.target.split(b"/")))
            elif child.is_dir:
                trail.append(child)
                if len(trail) > MAX_DEPTH:
                    raise ImageError("the archive nests directories too deeply", hint="do not trust it")
            else:
                return None
        return trail[-1]

    def _count(self) -> None:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise ImageError(
                "the archive has more members than allowed",
                hint="make it smaller; if it should be small, do not trust it",
            )


def _show(path: Path) -> str:
    return repr("/" + b"/".join(path)[:200].decode("utf-8", "backslashreplace"))
