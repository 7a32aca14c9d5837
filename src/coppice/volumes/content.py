"""Fill a volume: write a tree in memory as an ext4 file system, by the tools of e2fsprogs and
without privileges.

mke2fs copies a directory, but only root could give its files to other owners. So that directory is
private and has only names, links and contents from the archive. Owners, modes, times and extended
attributes are written into the file system afterwards, by inode number: no name from an archive
becomes part of a command. Until then the modification time of each file is a number that identifies
it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from coppice import stopping
from coppice.errors import HostCannot, ImageError
from coppice.images.archive import open_archive
from coppice.images.catalog import as_image_errors
from coppice.images.layer import apply_archive
from coppice.images.tree import Content, FileTree, Node
from coppice.images.workspace import CHUNK, Limits, Workspace
from coppice.linux.e2fs import run_e2fs
from coppice.model import ProgressSink
from coppice.volumes import disk as volume

_FIRST_TIME = 1_000_000_000  # of the first file, in seconds; far from the times of mke2fs's own files
_LATEST_S = (1 << 34) - (1 << 31) - 1  # the largest 34-bit time, counted from 1901
_DEPTH_MAX = 128
_XATTR = re.compile(rb"(user|trusted|security|system)\.[A-Za-z0-9_.:@+-]+")
_TOOL_DEADLINE_S = 600.0
_ROOT_INODE = 2
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def volume_from_archive(archive: Path, disk: Path, size_bytes: int, *, progress: ProgressSink) -> None:
    """Make the disk of a volume with the contents of a tar archive, compressed or not. Blocks.

    Raises UnsafePath or ImageError for an invalid archive, UsageError if it does not fit,
    MissingTool, NoSpace or HostCannot.
    """
    limits = Limits()
    with (
        as_image_errors(),
        Workspace(disk.parent, limits=limits, progress=progress) as workspace,
    ):
        tree = FileTree(max_nodes=limits.max_members)
        apply_archive(tree, open_archive(archive, workspace), whiteouts=False)
        write_ext4(tree, disk, size_bytes, workspace)


def write_ext4(tree: FileTree, disk: Path, size_bytes: int, workspace: Workspace) -> None:
    """Write the tree as an ext4 file system of that size at `disk`.

    Its files are staged in the workspace.

    Raises ImageError for content that a volume cannot hold, UsageError if it does not fit,
    MissingTool, NoSpace or HostCannot.
    """
    nodes = list({id(node): node for node in (tree.root, *(node for _, _, node in tree.walk()))}.values())
    content, inodes = workspace.path / "content", workspace.path / "inodes"
    try:
        content.mkdir(mode=0o700)
        inodes.mkdir(mode=0o700)
        numbers = _stage(nodes, inodes, workspace)
        with _opened(content) as root, _opened(inodes) as staged:
            _plant(tree.root, root, staged, numbers)
        volume.create(disk, size_bytes, content=content, finish=partial(_furnish, nodes=nodes, scratch=inodes))
    finally:
        shutil.rmtree(content, ignore_errors=True)
        shutil.rmtree(inodes, ignore_errors=True)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, _DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ---- the directory that mke2fs copies ----


def _stage(nodes: list[Node], inodes: Path, workspace: Workspace) -> dict[int, int]:
    """Make each file that is not a directory, named by its number; return the numbers by the nodes'
    ids.
    """
    total = sum(node.content.size for node in nodes if node.content)
    done = 0
    for number, node in enumerate(nodes):
        stopping.check()
        path = inodes / str(number)
        if node.content:
            with path.open("xb") as file:
                _write(node.content, file)
            done += node.content.size
            workspace.report("copy", done, total)
        elif stat.S_ISREG(node.mode):
            path.touch()
        elif stat.S_ISLNK(node.mode):
            path.symlink_to(os.fsdecode(node.target))
        elif stat.S_ISFIFO(node.mode):
            os.mkfifo(path)
        elif not node.is_dir:
            raise ImageError(
                "the archive contains a device node, which volumes cannot hold", hint="make it without /dev"
            )
        if not node.is_dir:
            os.utime(path, (_FIRST_TIME + number,) * 2, follow_symlinks=False)
    return {id(node): number for number, node in enumerate(nodes)}


def _write(content: Content, file: BinaryIO) -> None:
    for chunk in content.chunks(0, content.size):
        stopping.check()
        if chunk.count(0) == len(chunk):
            file.seek(len(chunk), os.SEEK_CUR)  # a hole, as it may have been before packing
        else:
            file.write(chunk)
    file.truncate(content.size)


def _plant(node: Node, directory: int, staged: int, numbers: dict[int, int], depth: int = 1) -> None:
    """Fill a directory: make its subdirectories, and links to the staged files."""
    stopping.check()
    for name, child in node.children.items():
        if not child.is_dir:
            os.link(str(numbers[id(child)]), name, src_dir_fd=staged, dst_dir_fd=directory, follow_symlinks=False)
            continue
        if depth == _DEPTH_MAX:
            raise ImageError(
                f"the archive nests directories more than {_DEPTH_MAX} deep", hint="make it with fewer levels"
            )
        os.mkdir(name, 0o700, dir_fd=directory)
        inner = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            _plant(child, inner, staged, numbers, depth + 1)
            os.utime(inner, (_FIRST_TIME + numbers[id(child)],) * 2)
        finally:
            os.close(inner)


# ---- metadata that is written into the file system ----


def _furnish(disk: Path, *, nodes: list[Node], scratch: Path) -> None:
    """Write owners, modes, times and extended attributes into a file system that already has the
    files.
    """
    found = _inodes(disk, nodes)
    if len(found) != len(nodes):
        raise HostCannot(
            f"mke2fs copied only {len(found)} of {len(nodes)} files",
            hint="install e2fsprogs 1.45 or later",
        )
    commands = [command for number, node in enumerate(nodes) for command in _commands(node, found[number], scratch)]
    script = scratch / "commands"
    script.write_bytes(b"\n".join(commands) + b"\n")
    # debugfs echoes each command after its own name. It continues after a failure, which its status
    # does not show.
    failures: list[str] = []

    def line(text: str) -> None:
        if text and not text.startswith("debugfs"):
            failures.append(text)

    done = run_e2fs("debugfs", "-w", "-f", str(script), str(disk), deadline_s=_TOOL_DEADLINE_S, line=line)
    if done.status != 0 or failures:
        said = " / ".join(failures[:3])
        raise HostCannot(
            f"debugfs could not write the volume's metadata: {said}",
            hint="check the owners, times and attributes in the archive",
        )


def _commands(node: Node, inode: int, scratch: Path) -> Iterator[bytes]:
    stopping.check()
    seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
    seconds = min(seconds, _LATEST_S)
    epoch = (seconds + (1 << 31)) >> 32  # the low 32 bits are signed
    fields: dict[str, str] = {"uid": f"{node.uid}", "gid": f"{node.gid}", "mode": f"0{node.mode:o}"}
    for time in ("atime", "mtime"):
        fields |= {time: f"@{seconds}", f"{time}_extra": f"{nanoseconds << 2 | epoch}"}
    for field, value in fields.items():
        yield f"sif <{inode}> {field} {value}".encode()
    for number, (name, contents) in enumerate(node.xattrs.items()):
        if not _XATTR.fullmatch(name):
            raise ImageError(
                f"the archive has the invalid extended attribute {name[:64]!r}", hint="make the archive without it"
            )
        file = scratch / f"{inode}-{number}"
        file.write_bytes(contents)
        quoted = str(file).replace('"', '""')
        yield f'ea_set -f "{quoted}" <{inode}> '.encode() + name


def _inodes(disk: Path, nodes: list[Node]) -> dict[int, int]:
    """Return the inode of each file by its number. (Layout: the kernel's
    Documentation/filesystems/ext4.)
    """
    found = {0: _ROOT_INODE}
    with disk.open("rb") as file:
        file.seek(1024)
        superblock = file.read(1024)
        (count,) = struct.unpack_from("<I", superblock, 0)
        (log_block,) = struct.unpack_from("<I", superblock, 0x18)
        (per_group,) = struct.unpack_from("<I", superblock, 0x28)
        (inode_size,) = struct.unpack_from("<H", superblock, 0x58)
        (descriptor_size,) = struct.unpack_from("<H", superblock, 0xFE)
        file.seek(1024 << log_block)  # after the first block, that of the superblock
        descriptors = file.read(-(-count // per_group) * descriptor_size)
        for group in range(count // per_group):
            at = group * descriptor_size
            low, high = (
                struct.unpack_from("<I", descriptors, at + 8)[0],
                struct.unpack_from("<I", descriptors, at + 40)[0],
            )
            table = (high << 32 | low) * (1024 << log_block)
            for index, inode in _used(file, table, per_group, inode_size):
                mode, links = struct.unpack_from("<H", inode, 0)[0], struct.unpack_from("<H", inode, 0x1A)[0]
                number = struct.unpack_from("<I", inode, 0x10)[0] - _FIRST_TIME
                if links and 0 < number < len(nodes) and stat.S_IFMT(mode) == stat.S_IFMT(nodes[number].mode):
                    found[number] = group * per_group + index + 1
    return found


def _used(file: BinaryIO, table: int, count: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the inodes of a table with their positions, skipping holes."""
    at, end = table, table + count * size
    while at < end:
        stopping.check()
        try:
            data = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:  # only a hole follows
            return
        at = max(at, data - (data - table) % size)
        chunk = os.pread(file.fileno(), min(CHUNK, max(0, end - at)), at)
        for offset in range(0, len(chunk), size):
            yield (at + offset - table) // size, chunk[offset : offset + size]
        at += CHUNK
