"""Writing a squashfs image: compressed, for those who would rather spend the guest's CPU than the host's disk.

`sqfstar` (squashfs-tools 4.5 and later) reads a tar stream, so owners and devices need no privilege here either.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from coppice.errors import ImageError, MissingTool
from coppice.images.tree import Content, FileTree, Node
from coppice.images.workspace import CHUNK

_EXIT_DEADLINE_S = 600.0  # to compress what its queues hold, after the last byte was taken
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


class _Chunks(io.RawIOBase):
    """Content as the file object that tarfile wants."""

    def __init__(self, content: Content) -> None:
        super().__init__()
        self._chunks = content.chunks(0, content.size)
        self._left = b""

    def read(self, size: int = -1, /) -> bytes:
        while len(self._left) < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._left += chunk
        data, self._left = self._left[:size], self._left[size:]
        return data


def write_squashfs(
    tree: FileTree, path: Path, *, max_bytes: int, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> str:
    """Write the tree as a zstd-compressed squashfs at `path`, which must not exist; return the SHA-256 of it in hex.

    `progress` is called with bytes of data written and bytes in all. Raises MissingTool, ImageError where the data is
    more than `max_bytes` or sqfstar fails.
    """
    tool = shutil.which("sqfstar")
    if tool is None:
        raise MissingTool("sqfstar is not installed", hint="install squashfs-tools 4.5 or later, or choose erofs")
    nodes = [tree.root, *{id(node): node for _, _, node in tree.walk()}.values()]
    total = sum(node.content.size for node in nodes if node.content)
    if total > max_bytes:
        raise ImageError(
            f"the root file system takes {total} bytes, more than is allowed",
            hint="make it smaller; if it should be small, do not trust it",
        )
    newest = min(max(node.mtime_ns for node in nodes) // 10**9, 0xFFFFFFFF)
    root = tree.root
    argv = [tool, "-comp", "zstd", "-quiet", "-no-progress", "-exit-on-error", "-mkfs-time", str(newest)]
    argv += ["-root-mode", f"{stat.S_IMODE(root.mode):o}", "-root-uid", str(root.uid), "-root-gid", str(root.gid)]
    argv += ["-root-time", str(min(root.mtime_ns // 10**9, 0xFFFFFFFF)), str(path)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        try:
            assert process.stdin is not None  # noqa: S101 - it is a pipe
            # Where sqfstar has ended early its exit status and log say why, not the broken pipe.
            with contextlib.suppress(BrokenPipeError), process.stdin as stream:
                _write_tar(tree, stream, lambda done: progress(done, total))
            status = process.wait(_EXIT_DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise ImageError("sqfstar did not finish", hint="look at the load of this machine") from error
        finally:
            process.kill()
            process.wait()
        if status:
            log.seek(0)
            said = log.read(CHUNK).decode("utf-8", "replace").strip().splitlines()[-3:]
            raise ImageError(f"sqfstar failed: {' / '.join(said)}", hint="choose erofs, or free some disk space")
    return _sha256(path)


def _write_tar(tree: FileTree, stream: IO[bytes], progress: Callable[[int], None]) -> None:
    names: dict[int, str] = {id(tree.root): "."}
    done = 0
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as tar:
        for directory, name, node in tree.walk():
            path = f"{names[id(directory)]}/{_text(name)}"
            first = names.setdefault(id(node), path)
            member = _member(node, path)
            if first != path:
                member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
            content = node.content if first == path else None
            tar.addfile(member, _Chunks(content) if content else None)
            done += member.size
            progress(done)


def _member(node: Node, path: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.type = _TYPES[stat.S_IFMT(node.mode)]
    member.mode, member.uid, member.gid = stat.S_IMODE(node.mode), node.uid, node.gid
    member.mtime = min(node.mtime_ns // 10**9, 0xFFFFFFFF)
    member.linkname = _text(node.target)
    member.devmajor, member.devminor = node.device
    member.size = node.content.size if node.content else 0
    member.pax_headers = {f"SCHILY.xattr.{_text(name)}": _text(value) for name, value in sorted(node.xattrs.items())}
    return member


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
