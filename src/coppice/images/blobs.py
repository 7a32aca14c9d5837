"""The blobs of an OCI layout or a `docker save` archive, read only against their digests.

A blob is what its digest says and not what its name says; both the bytes as stored and, for layers, the bytes unpacked
are hashed.
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

from coppice.errors import DigestMismatch, ImageError, UsageError
from coppice.images.archive import Archive, open_regular
from coppice.images.compression import MAGIC_BYTES, Decompressor
from coppice.images.workspace import CHUNK, Workspace

_CURE = "fetch or make the archive again"
_DIGEST = re.compile(r"(sha256):([0-9a-f]{64})|(sha512):([0-9a-f]{128})")


class Platform(msgspec.Struct, frozen=True):
    """The machine a manifest is for."""

    architecture: str = ""
    os: str = ""


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
        """Whether there is such a file."""

    def open(self, name: str) -> IO[bytes]:
        """The file, for reading in pieces. Raises ImageError where there is none."""


class DirectoryBundle:
    """An OCI layout on disk. Names come from validated digests only, so none leads out of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self._path / name).is_file()

    def open(self, name: str) -> IO[bytes]:
        """The file. Raises ImageError where there is none, or where it is a device or a fifo."""
        try:
            return open_regular(self._path / name)
        except UsageError as error:
            raise ImageError(f"the layout names {name[:200]!r} but does not have it", hint=_CURE) from error


class ArchiveBundle:
    """The same inside of a tar archive; links between its members are followed, never out of it."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._members = {posixpath.normpath(member.name): member for member in archive.members}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._resolve(name) is not None

    def has_top(self, names: tuple[str, ...]) -> bool:
        """Whether any of `names` is at the top of the archive, as a member or as the directory of one."""
        return any(member.lstrip("/").split("/", 1)[0] in names for member in self._members)

    def open(self, name: str) -> IO[bytes]:
        """The member. Raises ImageError where there is none."""
        member = self._resolve(name)
        if member is None:
            raise ImageError(f"the archive names {name[:200]!r} but does not have it", hint=_CURE)
        return self._archive.open(member)

    def _resolve(self, name: str) -> tarfile.TarInfo | None:
        name = posixpath.normpath(name)
        for _ in range(2):  # `docker save` links equal layers of its legacy form to the first of them
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
    """The verified plain bytes of one layer, in a file of the workspace."""
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
        # A damaged blob usually fails to decompress before all of it was hashed. Its digest is the better answer.
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
            raise ImageError(f"{digest[:100]!r} is not a digest", hint="only sha256 and sha512 are known")
        self._digest = digest
        self._algorithm = match[1] or match[3]
        self._hash = hashlib.new(self._algorithm)
        self._left = size

    def update(self, data: bytes) -> None:
        """Raises DigestMismatch as soon as there are more bytes than were announced."""
        self._hash.update(data)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise DigestMismatch(f"blob {self._digest} is longer than its descriptor says", hint=_CURE)

    def update_from(self, file: IO[bytes]) -> None:
        """All that is left in `file`."""
        while data := file.read(CHUNK):
            self.update(data)

    def finish(self) -> None:
        """Raises DigestMismatch where the bytes are not the ones that the digest names."""
        if self._left:
            raise DigestMismatch(f"blob {self._digest} is {self._left} bytes short", hint=_CURE)
        if f"{self._algorithm}:{self._hash.hexdigest()}" != self._digest:
            raise DigestMismatch(f"the bytes of {self._digest} do not hash to it", hint=_CURE)


def read_blob(bundle: Bundle, descriptor: Descriptor, workspace: Workspace) -> bytes:
    """A verified JSON blob."""
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
        raise ImageError(f"{descriptor.digest[:100]!r} is not a digest", hint="only sha256 and sha512 are known")
    return f"blobs/{descriptor.digest.replace(':', '/')}"
