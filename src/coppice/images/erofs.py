"""Write an EROFS image: read-only, uncompressed, in one sequential pass.

mkfs.erofs is not used because it needs a directory: a root file system would first be unpacked on
the host, which needs root for owners and devices. Its output also differs between versions. The
format without compression is small, and the kernel fixes it (fs/erofs/erofs_fs.h). The same tree
gives the same bytes on every host.

It is uncompressed because guests may run under emulation, where decompression costs more than
reading. The host's page cache holds the file once for all guests.

Layout, in blocks of 4 KiB: superblock at 1024; inodes, each followed by its extended attributes
and, if it fits, the tail of its data; then all whole blocks of data. Every directory block is a
separate small table, with names in byte order.
"""

from __future__ import annotations

import hashlib
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from coppice import stopping
from coppice.errors import ImageError
from coppice.images.tree import Bytes, Content, FileTree, Node

BLOCK = 4096
MAGIC = 0xE0F5E1E2
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
_SUPERBLOCK_OFFSET = 1024
_COMPAT_MTIME = 0x2
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_DIRENT = struct.Struct("<QHBx")
_SLOT = 32  # inodes are numbered by their offset in units of this
_PLAIN, _INLINE = 0, 2
_EXTENDED = 1
_MAX_INLINE = 2048  # a longer tail would waste more padding than it saves
_XATTR_HEADER = 12
_XATTR_PREFIXES = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)
_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


@dataclass(slots=True)
class _Inode:
    node: Node
    number: int
    size: int
    xattrs: bytes
    parent: _Inode | None = None  # the parent of a directory
    links: int = 0
    offset: int = 0  # of the inode, in bytes
    inline: int = 0  # bytes of the data that follow the inode
    first_block: int = 0

    @property
    def whole_blocks(self) -> int:
        return -(-(self.size - self.inline) // BLOCK)

    @property
    def head_size(self) -> int:
        return _INODE.size + len(self.xattrs)


class _Image:
    """The plan of one image: all positions are known before the first byte is written."""

    def __init__(self, tree: FileTree, max_bytes: int) -> None:
        self.inodes: list[_Inode] = []
        self._by_node: dict[int, _Inode] = {}
        self._collect(tree)
        position = _SUPERBLOCK_OFFSET + _SUPERBLOCK.size
        for inode in self.inodes:
            stopping.check()
            position = _place(inode, position)
        # Leave space for a header of attributes after the last inode too: fsck.erofs 1.5 always
        # reads one.
        block = -(-(position + _XATTR_HEADER) // BLOCK)
        self.metadata_blocks = block
        for inode in self.inodes:
            inode.first_block = block
            block += inode.whole_blocks
        self.blocks = block
        if self.blocks * BLOCK > max_bytes or self.blocks >= 1 << 32:
            raise ImageError(
                f"the root file system takes {self.blocks * BLOCK} bytes, more than allowed",
                hint="make it smaller; if it should be small, do not trust it",
            )

    def _collect(self, tree: FileTree) -> None:
        root = self._add(tree.root)
        root.parent = root  # ".." of the root is the root
        root.links = 2
        for directory, _, node in tree.walk():
            inode = self._by_node.get(id(node)) or self._add(node)
            inode.links += 1
            if node.is_dir:
                inode.parent = self._by_node[id(directory)]
                inode.links += 1  # its "."
                inode.parent.links += 1  # its ".."

    def _add(self, node: Node) -> _Inode:
        inode = _Inode(node, len(self.inodes) + 1, _data_size(node), _xattr_area(node.xattrs))
        self._by_node[id(node)] = inode
        self.inodes.append(inode)
        return inode

    def entries(self, inode: _Inode) -> dict[bytes, _Inode]:
        """Return the entries of a directory, including itself and its parent."""
        assert inode.parent is not None  # noqa: S101 - only called for directories
        found = {name: self._by_node[id(child)] for name, child in inode.node.children.items()}
        return {b".": inode, b"..": inode.parent, **found}

    def content(self, inode: _Inode) -> Content:
        """Return the data of an inode of any type."""
        node = inode.node
        if node.is_dir:
            return Bytes(_directory_data(self.entries(inode)))
        return node.content or Bytes(node.target)

    def superblock(self) -> bytes:
        """Return the superblock.

        Its time is that of the newest file, so that the same tree gives the same image.
        """
        newest = max(inode.node.mtime_ns for inode in self.inodes)
        return _SUPERBLOCK.pack(
            MAGIC,
            0,  # checksum: this feature is off; the image's digest covers everything
            _COMPAT_MTIME,
            BLOCK.bit_length() - 1,
            0,
            self.inodes[0].offset // _SLOT,  # the root, which comes first: its number has only 16 bits
            len(self.inodes),
            newest // 10**9,
            newest % 10**9,
            self.blocks,
            0,  # inodes are numbered from block 0
            0,  # no shared xattrs
            bytes(16),
            bytes(16),
            0,
        )


def write_erofs(
    tree: FileTree,
    file: IO[bytes],
    *,
    max_bytes: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> str:
    """Write the tree as an EROFS image, and return its SHA-256 in hex.

    `progress` is called with bytes written and total bytes, after about every MiB. Raises
    ImageError if the image would be larger than `max_bytes`, or an archive that holds a file is
    truncated; OSError as the file does.
    """
    image = _Image(tree, max_bytes)
    total = image.blocks * BLOCK
    digest = hashlib.sha256()
    done = reported = 0
    for piece in _pieces(image):
        stopping.check()
        file.write(piece)
        digest.update(piece)
        done += len(piece)
        if done - reported >= 1 << 20:
            progress(done, total)
            reported = done
    progress(done, total)
    return digest.hexdigest()


def _pieces(image: _Image) -> Iterator[bytes]:
    """Yield the image from the first byte to the last."""
    yield bytes(_SUPERBLOCK_OFFSET) + image.superblock()
    position = _SUPERBLOCK_OFFSET + _SUPERBLOCK.size
    for inode in image.inodes:
        yield bytes(inode.offset - position) + _head(inode)
        if inode.inline:
            yield from image.content(inode).chunks(inode.size - inode.inline, inode.inline)
        position = inode.offset + inode.head_size + inode.inline
    yield bytes(image.metadata_blocks * BLOCK - position)
    for inode in image.inodes:
        length = inode.size - inode.inline
        if length:
            yield from image.content(inode).chunks(0, length)
            yield bytes(-length % BLOCK)


def _place(inode: _Inode, position: int) -> int:
    """Give the inode its offset at or after `position`; return its end."""
    tail = inode.size % BLOCK
    inode.inline = tail if tail <= _MAX_INLINE and inode.head_size + tail <= BLOCK else 0
    position += -position % _SLOT
    # The kernel requires an inode, its attributes and its inline data in one block; without inline
    # data, the attributes may continue in the next.
    if position % BLOCK + inode.head_size + inode.inline > BLOCK:
        position += -position % BLOCK
    inode.offset = position
    return position + inode.head_size + inode.inline


def _head(inode: _Inode) -> bytes:
    """Return the inode and its extended attributes."""
    node = inode.node
    if stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        major, minor = node.device
        where = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)  # as new_encode_dev() of the kernel
    else:
        where = inode.first_block
    return (
        _INODE.pack(
            _EXTENDED | (_INLINE if inode.inline else _PLAIN) << 1,
            (len(inode.xattrs) - _XATTR_HEADER) // 4 + 1 if inode.xattrs else 0,
            node.mode,
            0,
            inode.size,
            where,
            inode.number,
            node.uid,
            node.gid,
            node.mtime_ns // 10**9,
            node.mtime_ns % 10**9,
            inode.links,
        )
        + inode.xattrs
    )


def _data_size(node: Node) -> int:
    if node.is_dir:
        *full, last = _directory_blocks([b".", b"..", *node.children])
        return len(full) * BLOCK + sum(_DIRENT.size + len(name) for name in last)
    return node.content.size if node.content else len(node.target)


def _directory_blocks(names: list[bytes]) -> list[list[bytes]]:
    """Return the names in order, split into blocks."""
    blocks: list[list[bytes]] = [[]]
    used = 0
    for name in sorted(names):
        used += _DIRENT.size + len(name)
        if used > BLOCK:
            blocks.append([])
            used = _DIRENT.size + len(name)
        blocks[-1].append(name)
    return blocks


def _directory_data(entries: dict[bytes, _Inode]) -> bytes:
    blocks = []
    for names in _directory_blocks(list(entries)):
        name_offset = len(names) * _DIRENT.size
        table = bytearray()
        for name in names:
            inode = entries[name]
            table += _DIRENT.pack(inode.offset // _SLOT, name_offset, _FILE_TYPES[stat.S_IFMT(inode.node.mode)])
            name_offset += len(name)
        blocks.append(bytes(table) + b"".join(names))
    return b"".join(block.ljust(BLOCK, b"\0") for block in blocks[:-1]) + blocks[-1]


def _xattr_area(xattrs: dict[bytes, bytes]) -> bytes:
    """Return the attributes as they follow their inode.

    Skip kinds that the format cannot store, as mkfs.erofs does.
    """
    area = bytearray()
    for name, value in sorted(xattrs.items()):
        for prefix, index in _XATTR_PREFIXES:
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                entry = struct.pack("<BBH", len(rest), index, len(value)) + rest + value
                area += entry + bytes(-len(entry) % 4)
                break
    if len(area) // 4 >= 0xFFFF:
        raise ImageError("a file has more extended attributes than an image can hold", hint="remove some of them")
    return bytes(_XATTR_HEADER) + bytes(area) if area else b""
