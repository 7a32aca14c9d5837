"""The format of an archive: a tar file whose members are a manifest, ranges of data, and digests.

    coppice-template.json    the manifest
    data/N/OFFSET            bytes of the manifest's file N from OFFSET on, both hexadecimal; in order
    coppice-digests.json     the SHA-256 of each file: of its whole content, with zeros for its holes

No name in an archive ever becomes a path: a reader knows which files a template has.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from coppice import stopping
from coppice.errors import ImageError
from coppice.model import MIB, Image, Instance, Record, from_json, to_json

FORMAT: Final = 2
BLOCK: Final = tarfile.BLOCKSIZE
MANIFEST: Final = "coppice-template.json"
DIGESTS: Final = "coppice-digests.json"
MOST_FILES: Final = 20_000
LARGEST_DOCUMENT: Final = 8 * MIB
LARGEST_TOTAL: Final = 1 << 40
"""Of all files together, with their holes: a digest of a TiB takes ten minutes, also of a TiB of zeros."""
CURE: Final = "export the template again; do not trust an archive that was changed"
_RANGE: Final = "data/{:x}/{:x}"
_ZEROS: Final = memoryview(bytes(MIB))


class ArchivedFile(Record, frozen=True, kw_only=True):
    """One file of a template."""

    path: str  # "memory", "memory.1", "vmstate", "overlay.raw", "overlay.1", "image", "kernel/vmlinuz"
    size_bytes: int
    data_bytes: int  # at most so many of them are in the archive; the others are zeros


class Manifest(Record, frozen=True, kw_only=True):
    """The first member of an archive."""

    format: int = FORMAT
    coppice: str  # the version that wrote the archive
    exported_at: float
    template: Instance  # without what belongs to its host, such as inodes, ports and owner
    image: Image
    kernel_sha256: str  # over the names and contents of the kernel's files
    files: tuple[ArchivedFile, ...]  # without those of the image and the kernel if the archive is bare


class Digests(Record, frozen=True, kw_only=True):
    """The last member of an archive."""

    sha256: tuple[str, ...]  # of each file of the manifest


def total_bytes(files: Sequence[ArchivedFile]) -> int:
    """Return the sizes of all files together, holes included."""
    return sum(file.size_bytes for file in files)


def data_bytes(files: Sequence[ArchivedFile]) -> int:
    """Return the most bytes of these files that an archive has."""
    return sum(file.data_bytes for file in files)


class Member(NamedTuple):
    """The header of a member."""

    name: str
    size: int

    @property
    def padded(self) -> int:
        """The bytes of the content in the archive."""
        return -(-self.size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """Return the header of a member."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    """Return the zeros between a content of this size and the next member."""
    return bytes(-size % BLOCK)


def name_of_range(file: int, offset: int) -> str:
    """Return the name of a range of a file."""
    return _RANGE.format(file, offset)


def document(name: str, value: Record) -> bytes:
    """Return a member with a JSON document."""
    text = to_json(value)
    return header(name, len(text)) + text + padding(len(text))


def member_of(block: bytes) -> Member:
    """Read the header of a member.

    :raises ImageError: it is not the header of a file
    """
    try:
        found = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ImageError("this is not an archive of a template: it has an invalid tar header", hint=CURE) from error
    if found.type != tarfile.REGTYPE or found.size < 0:
        raise ImageError(f"the archive has a member {found.name[:80]!r} that is not a file", hint=CURE)
    return Member(found.name, found.size)


def decoded(text: bytes, kind: type[Any], what: str) -> Any:
    """Return the value of a JSON document.

    :raises ImageError: it is not of this kind
    """
    try:
        return from_json(text, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, NotImplementedError) as error:
        raise ImageError(f"the {what} of the archive is not valid: {error}", hint=CURE) from error


def add_zeros(digest: hashlib._Hash, count: int) -> None:
    """Add zeros to a digest."""
    while count > 0:
        stopping.check()
        digest.update(_ZEROS[:count])
        count -= len(_ZEROS)
