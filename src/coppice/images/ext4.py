"""The content of a volume: a tree in memory as an ext4 file system, by the tools of e2fsprogs and without any privilege.

mke2fs copies a directory; but only root could give files in it to others. So that directory is private and holds names, links and contents, and nothing else of
what the archive says. Owners, modes, times and extended attributes are written into the file system afterwards, by the number of the inode: no name
of an archive is ever part of a command. Which inode is which file tells its modification time, which is a number of ours until then.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from coppice.disk import volume
from coppice.disk.ext4 import run_tool
from coppice.errors import HostCannot, ImageError
from coppice.images.archive import open_archive
from coppice.images.catalog import as_image_errors
from coppice.images.layer import apply_archive
from coppice.images.tree import Content, FileTree, Node
from coppice.images.workspace import CHUNK, Limits, Workspace
from coppice.model import ProgressSink

_FIRST_TIME = 1_000_000_000  # of the first file, in seconds; far from the time of what mke2fs makes by itself
_LATEST_S = (1 << 34) - (1 << 31) - 1  # what 34 bits hold, from 1901 on
_DEPTH_MAX = 128
_XATTR = re.compile(rb"(user|trusted|security|system)\.[A-Za-z0-9_.:@+-]+")
_TOOL_DEADLINE_S = 600.0
_ROOT_INODE = 2
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def volume_from_archive(
    archive: Path, disk: Path, size_bytes: int, *, progress: ProgressSink, cancelled: threading.Event
) -> None:
    """Make the disk of a volume with the contents of a tar archive, compressed or not. Blocks.

    Raises UnsafePath or ImageError where the archive is not to be had as files, UsageError where it does not fit, MissingTool, NoSpace or HostCannot.
    """
    limits = Limits()
    with (
        as_image_errors(),
        Workspace(disk.parent, limits=limits, progress=progress, cancelled=cancelled) as workspace,
    ):
        tree = FileTree(max_nodes=limits.max_members)
        apply_archive(tree, open_archive(archive, workspace), workspace, whiteouts=False)
        write_ext4(tree, disk, size_bytes, workspace)


def write_ext4(tree: FileTree, disk: Path, size_bytes: int, workspace: Workspace) -> None:
    """Write the tree as an ext4 file system of that size at `disk`, with all that goes into it staged in the workspace meanwhile.

    Raises ImageError for what a volume cannot have, UsageError where it does not fit, MissingTool, NoSpace or HostCannot.
    """
    nodes = list({id(node): node for node in (tree.root, *(node for _, _, node in tree.walk()))}.values())
    content, inodes = workspace.path / "content", workspace.path / "inodes"
    try:
        content.mkdir(mode=0o700)
        inodes.mkdir(mode=0o700)
        numbers = _stage(nodes, inodes, workspace)
        with _opened(content) as root, _opened(inodes) as staged:
            _plant(tree.root, root, staged, numbers, workspace)
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
    """Make each file that is no directory, under its number; return the numbers by the nodes' ids."""
    total = sum(node.content.size for node in nodes if node.content)
    done = 0
    for number, node in enumerate(nodes):
        path = inodes / str(number)
        if node.content:
            with path.open("xb") as file:
                _write(node.content, file, workspace)
            done += node.content.size
            workspace.report("copy", done, total)
        elif stat.S_ISREG(node.mode):
            path.touch()
        elif stat.S_ISLNK(node.mode):
            path.symlink_to(os.fsdecode(node.target))
        elif stat.S_ISFIFO(node.mode):
            os.mkfifo(path)
        elif not node.is_dir:
            raise ImageError("the archive has a device in it, which volumes have not", hint="leave /dev out of it")
        if not node.is_dir:
            os.utime(path, (_FIRST_TIME + number,) * 2, follow_symlinks=False)
    return {id(node): number for number, node in enumerate(nodes)}


def _write(content: Content, file: BinaryIO, workspace: Workspace) -> None:
    for chunk in content.chunks(0, content.size):
        workspace.check()
        if chunk.count(0) == len(chunk):
            file.seek(len(chunk), os.SEEK_CUR)  # a hole, as it may have been before it was packed
        else:
            file.write(chunk)
    file.truncate(content.size)


def _plant(
    node: Node, directory: int, staged: int, numbers: dict[int, int], workspace: Workspace, depth: int = 1
) -> None:
    """Give a directory what is in it: directories of its own, and links to the files that are staged."""
    workspace.check()
    for name, child in node.children.items():
        if not child.is_dir:
            os.link(str(numbers[id(child)]), name, src_dir_fd=staged, dst_dir_fd=directory, follow_symlinks=False)
            continue
        if depth == _DEPTH_MAX:
            raise ImageError(f"the archive has directories more than {_DEPTH_MAX} deep", hint="make it less deep")
        os.mkdir(name, 0o700, dir_fd=directory)
        inner = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            _plant(child, inner, staged, numbers, workspace, depth + 1)
            os.utime(inner, (_FIRST_TIME + numbers[id(child)],) * 2)
        finally:
            os.close(inner)


# ---- what only the file system itself can be told ----


def _furnish(disk: Path, *, nodes: list[Node], scratch: Path) -> None:
    """Write owners, modes, times and extended attributes into a file system that has the files already."""
    found = _inodes(disk, nodes)
    if len(found) != len(nodes):
        raise HostCannot(
            f"mke2fs has copied {len(found)} of {len(nodes)} files",
            hint="see that e2fsprogs 1.45 or later is installed",
        )
    commands = [command for number, node in enumerate(nodes) for command in _commands(node, found[number], scratch)]
    script = scratch / "commands"
    script.write_bytes(b"\n".join(commands) + b"\n")
    done = run_tool("debugfs", "-w", "-f", str(script), str(disk), deadline_s=_TOOL_DEADLINE_S)
    # It repeats each command behind its own name, and goes on after a failure, which its status does not tell.
    failures = [line for line in done.stdout.splitlines() if line and not line.startswith(b"debugfs")]
    if done.returncode != 0 or failures:
        said = b" / ".join(failures[:3]).decode("utf-8", "replace")
        raise HostCannot(f"debugfs could not finish the volume: {said}", hint="see what the archive asks for")


def _commands(node: Node, inode: int, scratch: Path) -> Iterator[bytes]:
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
            raise ImageError(f"the archive has an extended attribute {name[:64]!r}", hint="leave it out")
        file = scratch / f"{inode}-{number}"
        file.write_bytes(contents)
        quoted = str(file).replace('"', '""')
        yield f'ea_set -f "{quoted}" <{inode}> '.encode() + name


def _inodes(disk: Path, nodes: list[Node]) -> dict[int, int]:
    """The inode of each file by its number. (Layout: the kernel's Documentation/filesystems/ext4.)"""
    found = {0: _ROOT_INODE}
    with disk.open("rb") as file:
        file.seek(1024)
        superblock = file.read(1024)
        (count,) = struct.unpack_from("<I", superblock, 0)
        (log_block,) = struct.unpack_from("<I", superblock, 0x18)
        (per_group,) = struct.unpack_from("<I", superblock, 0x28)
        (inode_size,) = struct.unpack_from("<H", superblock, 0x58)
        (descriptor_size,) = struct.unpack_from("<H", superblock, 0xFE)
        file.seek(1024 << log_block)  # behind the superblock's, which is the first: blocks are larger than 1024 bytes
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
    """The inodes of a table, with their places in it, as far as it is no hole."""
    at, end = table, table + count * size
    while at < end:
        try:
            data = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        at = max(at, data - (data - table) % size)
        chunk = os.pread(file.fileno(), min(CHUNK, max(0, end - at)), at)
        for offset in range(0, len(chunk), size):
            yield (at + offset - table) // size, chunk[offset : offset + size]
        at += CHUNK
