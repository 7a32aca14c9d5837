"""Archives and layouts for the image tests, and a reader of EROFS that shares no code with the
writer.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import stat
import struct
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coppice.images.archive import Archive
from coppice.images.catalog import ImageCatalog
from coppice.images.layer import apply_archive
from coppice.images.tree import FileTree
from coppice.images.workspace import Limits, Workspace
from coppice.model import no_progress
from coppice.state.store import Store
from coppice.vmm.process import own_process

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"

Member = tuple[tarfile.TarInfo, bytes]


def file(name: str, data: bytes = b"", *, mode: int = 0o644, uid: int = 0, gid: int = 0, mtime: float = 0) -> Member:
    """Return a regular file."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uid, info.gid, info.mtime = len(data), mode, uid, gid, mtime
    return info, data


def other(kind: bytes, name: str, target: str = "", *, mode: int = 0o755, device: tuple[int, int] = (0, 0)) -> Member:
    """Return a member without data: directory, link, device, fifo."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    info.devmajor, info.devminor = device
    return info, b""


def directory(name: str, mode: int = 0o755) -> Member:
    """Return a directory."""
    return other(tarfile.DIRTYPE, name, mode=mode)


def symlink(name: str, target: str) -> Member:
    """Return a symlink."""
    return other(tarfile.SYMTYPE, name, target)


def hardlink(name: str, target: str) -> Member:
    """Return a hard link."""
    return other(tarfile.LNKTYPE, name, target)


def tar(*members: Member) -> bytes:
    """Return a whole archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@contextmanager
def workspace(path: Path, limits: Limits | None = None) -> Iterator[Workspace]:
    """Return a workspace in `path` that is never cancelled."""
    with Workspace(path, limits=limits or Limits(), progress=no_progress) as space:
        yield space


def set_flag() -> threading.Event:
    """Return the flag of work whose caller was cancelled."""
    flag = threading.Event()
    flag.set()
    return flag


def open_catalog(home: Path) -> ImageCatalog:
    """Return the images of a data directory."""
    return ImageCatalog(home / "images", Store(home / "coppice.db", own_process()).images)


def apply_layers(space: Workspace, *layers: bytes, whiteouts: bool = True) -> FileTree:
    """Return the tree after these layers."""
    tree = FileTree(max_nodes=space.limits.max_members)
    for layer in layers:
        apply_archive(tree, Archive(io.BytesIO(layer), space, must_end=True), whiteouts=whiteouts)
    return tree


def names(tree: FileTree) -> set[str]:
    """Return all paths in the tree."""
    paths = {id(tree.root): ""}
    found = set()
    for parent, name, node in tree.walk():
        path = f"{paths[id(parent)]}/{name.decode()}"
        paths[id(node)] = path
        found.add(path)
    return found


def text(tree: FileTree, path: str) -> bytes:
    """Return the bytes of a file in the tree."""
    node = tree.find(tuple(part.encode() for part in path.split("/")))
    assert node is not None
    assert node.content is not None
    return b"".join(node.content.chunks(0, node.content.size))


class Layout:
    """An OCI layout directory, made by hand so that any part of it can be wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, media_type: str) -> dict[str, object]:
        """Store a blob; return its descriptor."""
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def image(
        self,
        *layers: bytes,
        compress: bool = True,
        architecture: str = ARCHITECTURE,
        process: dict[str, object] | None = None,
        diff_ids: list[str] | None = None,
    ) -> dict[str, object]:
        """Store config, layers and manifest of an image; return the manifest's descriptor."""
        if diff_ids is None:
            diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": process or {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        kind = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if compress else "")
        stored = [self.blob(gzip.compress(layer, mtime=0) if compress else layer, kind) for layer in layers]
        manifest = {
            "schemaVersion": 2,
            "config": self.blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": stored,
        }
        return self.blob(json.dumps(manifest).encode(), MANIFEST_TYPE)

    def index(self, *descriptors: dict[str, object]) -> Path:
        """Write index.json; return the layout's path."""
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": descriptors}))
        return self.path

    def tar(self, target: Path) -> Path:
        """Return the whole layout as a tar archive."""
        with tarfile.open(target, "w") as archive:
            archive.add(self.path, arcname=".")
        return target


def docker_archive(target: Path, *layers: bytes, tags: tuple[str, ...] = ("demo:latest",), **process: object) -> Path:
    """Write an archive in the legacy form of `docker save`, in which a repeated layer is a symlink
    to the first.
    """
    config = json.dumps(
        {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": process,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(la).hexdigest()}" for la in layers]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    members = [file(config_name, config)]
    seen: dict[bytes, str] = {}
    paths = []
    for number, layer in enumerate(layers):
        path = f"{number:064x}/layer.tar"
        paths.append(path)
        members.append(symlink(path, f"../{seen[layer]}") if layer in seen else file(path, layer))
        seen.setdefault(layer, path)
    manifest = [{"Config": config_name, "RepoTags": list(tags), "Layers": paths}]
    target.write_bytes(tar(*members, file("manifest.json", json.dumps(manifest).encode())))
    return target


@dataclass(frozen=True)
class Entry:
    """One path of an image file, as read back."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    links: int
    inode: int
    device: tuple[int, int]
    xattrs: dict[str, bytes]
    data: bytes

    @property
    def permissions(self) -> int:
        """Return permissions with setuid, setgid and sticky."""
        return stat.S_IMODE(self.mode)


def read_erofs(path: Path) -> dict[str, Entry]:
    """Read an uncompressed EROFS image by path; fsck.erofs must find it sound too."""
    checked = subprocess.run(["fsck.erofs", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    image = path.read_bytes()
    assert len(image) % 4096 == 0
    magic, _, _, block_bits, _, root = struct.unpack_from("<IIIBBH", image, 1024)
    assert (magic, block_bits) == (0xE0F5E1E2, 12)
    found: dict[str, Entry] = {}
    pending = [("/", root)]
    while pending:
        name, nid = pending.pop()
        entry = found[name] = _read_inode(image, nid * 32)
        if stat.S_ISDIR(entry.mode):
            below = _read_directory(entry.data)
            assert list(below) == sorted(below)
            assert below[b"."] == nid
            for child, child_nid in below.items():
                if child not in (b".", b".."):
                    pending.append((f"{name.rstrip('/')}/{child.decode('utf-8', 'surrogateescape')}", child_nid))
    return found


def _read_inode(image: bytes, at: int) -> Entry:
    form, xattr_count, mode, _, size, where, number, uid, gid, seconds, nanoseconds, links = struct.unpack_from(
        "<HHHHQIIIIQII", image, at
    )
    assert form & 1
    xattr_size = 12 + (xattr_count - 1) * 4 if xattr_count else 0
    after = at + 64 + xattr_size
    device = (0, 0)
    data = b""
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        device = ((where & 0xFFF00) >> 8, (where & 0xFF) | ((where >> 12) & 0xFFF00))
    else:
        inline = size % 4096 if form >> 1 == 2 else 0
        data = image[where * 4096 : where * 4096 + size - inline] + image[after : after + inline]
        assert len(data) == size
        assert not inline or (after + inline - 1) // 4096 == at // 4096
    return Entry(
        mode, uid, gid, seconds * 10**9 + nanoseconds, links, number, device, _read_xattrs(image, at + 76, after), data
    )


def _read_xattrs(image: bytes, at: int, end: int) -> dict[str, bytes]:
    prefixes = {1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}
    found = {}
    while at < end:
        name_length, prefix, value_length = struct.unpack_from("<BBH", image, at)
        name = image[at + 4 : at + 4 + name_length].decode()
        found[prefixes[prefix] + name] = image[at + 4 + name_length : at + 4 + name_length + value_length]
        at += -(-(4 + name_length + value_length) // 4) * 4
    return found


def _read_directory(data: bytes) -> dict[bytes, int]:
    found = {}
    for start in range(0, len(data), 4096):
        block = data[start : start + 4096]
        count = struct.unpack_from("<QH", block)[1] // 12
        offsets = [struct.unpack_from("<QHB", block, index * 12) for index in range(count)]
        ends = [*(offset for _, offset, _ in offsets[1:]), len(block)]
        for (nid, offset, _), end in zip(offsets, ends, strict=True):
            found[block[offset:end].rstrip(b"\0")] = nid
    return found
