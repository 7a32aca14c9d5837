"""The blobs of an OCI layout or a `docker save` archive, verified against their digests when they
are read.

The digest defines a blob, not its name. The stored bytes are hashed and, for layers, also the
unpacked bytes.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import tarfile
from pathlib import Path
from typing import IO, Protocol

import msgspec

from coppice import stopping
from coppice.errors import DigestMismatch, ImageError, UsageError
from coppice.images.archive import Archive, open_regular
from coppice.images.compression import MAGIC_BYTES, Decompressor
from coppice.images.workspace import CHUNK, Workspace

_CURE = "fetch or make the archive again"
_DIGEST = re.compile(r"(sha256):([0-9a-f]{64})|(sha512):([0-9a-f]{128})")


class Platform(msgspec.Struct, frozen=True):
    """The platform that a manifest is for."""

    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A reference to a blob."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None


class Bundle(Protocol):
    """Files by relative name: a layout directory, or an archive of one."""

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""

    def open(self, name: str) -> IO[bytes]:
        """Open the file, for reading in pieces. Raises ImageError if it is missing."""


class DirectoryBundle:
    """An OCI layout on disk. Names come from validated digests only, so none points outside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""
        return (self._path / name).is_file()

    def open(self, name: str) -> IO[bytes]:
        """Open the file. Raises ImageError if it is missing, a device or a fifo."""
        try:
            return open_regular(self._path / name)
        except UsageError as error:
            raise ImageError(f"the layout refers to {name[:200]!r}, which is missing", hint=_CURE) from error


class ArchiveBundle:
    """The same inside a tar archive.

    Links between its members are followed, but never outside it.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._members = {posixpath.normpath(member.name): member for member in archive.members}

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""
        return self._resolve(name) is not None

    def has_top(self, names: tuple[str, ...]) -> bool:
        """Return whether any of `names` is at the top of the archive, as a member or as a
        directory.
        """
        return any(member.lstrip("/").split("/", 1)[0] in names for member in self._members)

    def open(self, name: str) -> IO[bytes]:
        """Open the member. Raises ImageError if it is missing."""
        member = self._resolve(name)
        if member is None:
            raise ImageError(f"the archive refers to {name[:200]!r}, which is missing", hint=_CURE)
        return self._archive.open(member)

    def _resolve(self, name: str) -> tarfile.TarInfo | None:
        name = posixpath.normpath(name)
        for _ in range(2):  # `docker save` links equal layers of its legacy form to the first one
            member = self._members.get(name)
            if member is None or member.isreg():
                return member
            if member.issym():
                name = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                name = posixpath.normpath(member.linkname)
            else:
                return None
        member = self._members.get(name)
        return member if member is not None and member.isreg() else None


def unpack_layer(blob: IO[bytes], descriptor: Descriptor | None, diff_id: str, workspace: Workspace) -> IO[bytes]:
    """Return the verified plain bytes of one layer, in a file of the workspace."""
    blob_check = Verifier(descriptor.digest, descriptor.size) if descriptor else None
    plain_check = Verifier(diff_id, None)
    plain_file = workspace.new_file()
    data = blob.read(MAGIC_BYTES)
    decompressor = Decompressor(data)
    done = 0
    try:
        while data:
            if blob_check:
                blob_check.update(data)
            for plain in decompressor.feed(data):
                workspace.spend(len(plain))
                plain_check.update(plain)
                plain_file.write(plain)
            done += len(data)
            workspace.report("unpack", done, descriptor.size if descriptor else None)
            data = blob.read(CHUNK)
        decompressor.finish()
    except ImageError:
        # A damaged blob usually fails to decompress before it is completely hashed. A digest
        # mismatch is the better error.
        if blob_check:
            blob_check.update_from(blob)
            blob_check.finish()
        raise
    if blob_check:
        blob_check.finish()
    plain_check.finish()
    plain_file.seek(0)
    return plain_file


class Verifier:
    """Hashes and counts bytes as they pass, and compares at the end."""

    def __init__(self, digest: str, size: int | None) -> None:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ImageError(f"{digest[:100]!r} is not a digest", hint="only sha256 and sha512 are supported")
        self._digest = digest
        self._algorithm = match[1] or match[3]
        self._hash = hashlib.new(self._algorithm)
        self._left = size

    def update(self, data: bytes) -> None:
        """Hash more bytes. Raises DigestMismatch as soon as there are more than announced."""
        self._hash.update(data)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise DigestMismatch(f"blob {self._digest} is longer than its descriptor says", hint=_CURE)

    def update_from(self, file: IO[bytes]) -> None:
        """Hash the rest of `file`."""
        while data := file.read(CHUNK):
            stopping.check()
            self.update(data)

    def finish(self) -> None:
        """Raise DigestMismatch if the bytes do not match the digest."""
        if self._left:
            raise DigestMismatch(f"blob {self._digest} is {self._left} bytes short", hint=_CURE)
        if f"{self._algorithm}:{self._hash.hexdigest()}" != self._digest:
            raise DigestMismatch(f"the blob {self._digest} does not match its digest", hint=_CURE)


def read_blob(bundle: Bundle, descriptor: Descriptor, workspace: Workspace) -> bytes:
    """Return a verified JSON blob."""
    verifier = Verifier(descriptor.digest, descriptor.size)
    data = read_document(bundle, blob_name(descriptor), workspace)
    verifier.update(data)
    verifier.finish()
    return data


def read_document(bundle: Bundle, name: str, workspace: Workspace) -> bytes:
    limit = workspace.limits.max_document_bytes
    data = io.BytesIO()
    with bundle.open(name) as file:
        while chunk := file.read(CHUNK):
            data.write(chunk)
            if data.tell() > limit:
                raise ImageError(f"{name[:200]!r} is larger than {limit} bytes", hint="do not trust this archive")
    return data.getvalue()


def blob_name(descriptor: Descriptor) -> str:
    if not _DIGEST.fullmatch(descriptor.digest) or descriptor.size < 0:
        raise ImageError(f"{descriptor.digest[:100]!r} is not a digest", hint="only sha256 and sha512 are supported")
    return f"blobs/{descriptor.digest.replace(':', '/')}"
