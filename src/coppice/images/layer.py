"""Apply tar archives to a tree: a plain root file system, or an OCI layer with its whiteouts.

The rules are those of the OCI image specification, layer.md. A whiteout hides only files of lower
layers, regardless of its position in its own layer. So all whiteouts of a layer are applied before
its other members.
"""

from __future__ import annotations

import math
import stat
import tarfile

from coppice import stopping
from coppice.errors import ImageError
from coppice.images.archive import Archive
from coppice.images.tree import Bytes, FileTree, Node, Path, split_path

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."  # bookkeeping of aufs, exported by old Docker
XATTR = "SCHILY.xattr."
MAX_ID = (1 << 32) - 1
MAX_SECONDS = 1 << 40
MAX_TARGET = 4095
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1  # the limits of the kernel's dev_t

# The guest mounts file systems on these, and cannot create them in its read-only root.
_GUEST_DIRECTORIES = {
    b"proc": 0o555,
    b"sys": 0o555,
    b"dev": 0o755,
    b"run": 0o755,
    b"tmp": 0o1777,
    b"etc": 0o755,
    b"var": 0o755,
    b"root": 0o700,
    b"mnt": 0o755,
}
_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
_VOLUME_LABEL = b"V"  # GNU tar --label: a header without a file


def apply_archive(tree: FileTree, archive: Archive, *, whiteouts: bool) -> None:
    """Apply one archive to the tree.

    With `whiteouts` it is a layer; else whiteout names are plain files.

    Raises UnsafePath for a member outside the root, ImageError for one that no file system can
    hold.
    """
    if whiteouts:
        for member in archive.members:
            stopping.check()
            _apply_whiteout(tree, split_path(_raw(member.name)))
    for member in archive.members:
        stopping.check()
        path = split_path(_raw(member.name))
        if member.type == _VOLUME_LABEL or (whiteouts and _is_marker(path)):
            continue
        if member.islnk():
            tree.link(path, split_path(_raw(member.linkname)))
        else:
            tree.put(path, node_of(member, archive))


def node_of(member: tarfile.TarInfo, archive: Archive) -> Node:
    """Return the inode of a member that is not a hard link. Raises ImageError if it is invalid."""
    name = member.name[:200]
    kind = stat.S_IFREG if member.isreg() else _KINDS.get(member.type)
    if kind is None:
        raise ImageError(f"{name!r} has the unknown member type {member.type!r}", hint="make the archive with GNU tar")
    if not (0 <= member.uid <= MAX_ID and 0 <= member.gid <= MAX_ID):
        raise ImageError(f"{name!r} has an owner that is not a 32-bit number", hint="make the archive again")
    node = Node(kind | member.mode & 0o7777, member.uid, member.gid, _mtime_ns(member.mtime), _xattrs(member))
    if kind == stat.S_IFREG:
        node.content = archive.content(member)
    elif kind == stat.S_IFLNK:
        node.mode = kind | 0o777  # a symlink has no permissions of its own
        node.target = _raw(member.linkname)
        if not 0 < len(node.target) <= MAX_TARGET or b"\0" in node.target:
            raise ImageError(f"{name!r} is a symlink with an invalid target", hint="make the archive again")
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        node.device = (member.devmajor, member.devminor)
        if not (0 <= member.devmajor <= MAX_MAJOR and 0 <= member.devminor <= MAX_MINOR):
            raise ImageError(f"{name!r} has a device number that Linux does not support", hint="make the archive again")
    return node


def prepare_for_guest(tree: FileTree) -> None:
    """Add what a guest needs in its root: mount points, and localhost in /etc/hosts.

    Raises ImageError if the tree is empty: an empty archive is a mistake, not an image.
    """
    if not tree.root.children:
        raise ImageError("the archive has no files", hint="check that it is the right one")
    for name, mode in _GUEST_DIRECTORIES.items():
        tree.ensure_directory((name,), mode)
    etc = tree.find((b"etc",))
    # Container runtimes mount their own /etc/hosts, so images often have none or an empty one.
    if etc is not None and etc.is_dir and not _has_content(etc.children.get(b"hosts")):
        text = b"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
        tree.put((b"etc", b"hosts"), Node(stat.S_IFREG | 0o644, content=Bytes(text)))


def _has_content(node: Node | None) -> bool:
    return node is not None and (node.content is None or node.content.size > 0)


def _apply_whiteout(tree: FileTree, path: Path) -> None:
    if not path or not path[-1].startswith(WHITEOUT):
        return
    if path[-1] == OPAQUE:
        tree.clear(path[:-1])
    elif not path[-1].startswith(RESERVED):
        hidden = path[-1].removeprefix(WHITEOUT)
        if hidden in (b"", b".", b".."):
            raise ImageError(f"the layer has the invalid whiteout {hidden!r}", hint="do not trust this archive")
        tree.remove((*path[:-1], hidden))


def _is_marker(path: Path) -> bool:
    return any(part.startswith(RESERVED) for part in path) or bool(path and path[-1].startswith(WHITEOUT))


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _mtime_ns(mtime: float) -> int:
    # A date before 1970 or after the year 36000 is a mistake or a trick, but no reason to refuse an
    # image.
    return int(min(max(mtime, 0), MAX_SECONDS) * 1_000_000_000) if math.isfinite(mtime) else 0


def _xattrs(member: tarfile.TarInfo) -> dict[bytes, bytes]:
    found = {
        _raw(key.removeprefix(XATTR)): _raw(value)
        for key, value in sorted(member.pax_headers.items())
        if key.startswith(XATTR)
    }
    for name, value in found.items():
        if len(name) > 255 or len(value) > 0xFFFF or b"\0" in name:
            raise ImageError(
                f"{member.name[:200]!r} has an extended attribute that Linux does not support", hint="do not trust it"
            )
    return found
