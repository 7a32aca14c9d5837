"""Archives from outside: any defect ends in an ImageError, in bounded time and memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coppice.errors import ImageError, UsageError
from coppice.images.archive import Archive, open_archive
from coppice.images.compression import Decompressor
from coppice.images.layer import apply_archive
from coppice.images.tree import FileTree
from coppice.images.workspace import Limits
from image_archives import apply_layers, directory, file, tar, text, workspace

COMPRESSORS = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"table"


def opened(path: Path, limits: Limits | None = None) -> set[str]:
    """Return the names of the archive's files."""
    with workspace(path.parent, limits) as space:
        return {member.name for member in open_archive(path, space).members}


def unfolded(data: bytes) -> bytes:
    """Return the decompressed stream."""
    decompressor = Decompressor(data[:6])
    plain = b"".join(decompressor.feed(data))
    decompressor.finish()
    return plain


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_each_compression_is_recognised(tmp_path: Path, kind: str) -> None:
    """The format is recognised by the bytes, not by the file's name."""
    path = tmp_path / "archive"
    path.write_bytes(COMPRESSORS[kind](tar(file("a", b"x" * 100_000), directory("d"))))
    assert opened(path) == {"a", "d"}


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if kind != "plain"])
def test_streams_may_be_concatenated(kind: str) -> None:
    """Several streams in one file are joined, as the compressors' own tools do; zeros after the
    last one are padding.
    """
    compress = COMPRESSORS[kind]
    assert unfolded(compress(b"one") + compress(b"two")) == b"onetwo"
    assert unfolded(compress(b"one") + bytes(512)) == b"one"


def test_skippable_frames_of_zstd_are_skipped() -> None:
    """zstd:chunked layers carry their table of contents in skippable frames."""
    compress = COMPRESSORS["zstd"]
    assert unfolded(compress(b"one") + SKIPPABLE + compress(b"two") + SKIPPABLE) == b"onetwo"


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_every_truncation_is_detected(tmp_path: Path, kind: str) -> None:
    """An archive without its end mark is refused, even if it ends between two members."""
    whole = tar(file("a", b"x" * 700), file("b", os.urandom(2000)))
    # one block of the end mark; the padding to a full record may be missing
    whole = whole[: 512 * 9]
    data = COMPRESSORS[kind](whole)
    path = tmp_path / "cut"
    cuts = range(0, len(data), 512 if kind == "plain" else 97)
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ImageError):
            opened(path)
    path.write_bytes(data)
    assert opened(path) == {"a", "b"}


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if kind != "plain"])
def test_damage_is_detected(tmp_path: Path, kind: str) -> None:
    """An archive with a flipped byte, in compressed data or in a plain header, is refused."""
    data = bytearray(COMPRESSORS[kind](tar(file("a", bytes(5000)))))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(ImageError):
        opened(path)


def test_a_damaged_header_in_the_middle_is_detected(tmp_path: Path) -> None:
    """The standard library stops silently at a bad header after the first one; Coppice refuses the
    archive.
    """
    data = bytearray(tar(file("a", b"1"), file("b", b"2"), file("c", b"3")))
    data[1024 + 3] ^= 0xFF
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(ImageError):
        opened(path)


@pytest.mark.parametrize("data", [b"", b"hello world", os.urandom(4096), b"\x1f\x8b"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    """Empty files, text and noise are not archives."""
    path = tmp_path / "no"
    path.write_bytes(data)
    with pytest.raises(ImageError):
        opened(path)


def test_other_kinds_of_paths_are_refused(tmp_path: Path) -> None:
    """A fifo does not block the import. A directory, a device and an impossible path are image
    errors; a missing path is a usage error.
    """
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(ImageError):
            opened(path)
    with pytest.raises(UsageError):
        opened(tmp_path / "missing")


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if kind != "plain"])
def test_compression_bombs_are_bounded(tmp_path: Path, kind: str) -> None:
    """Data that decompresses beyond the limit is refused during decompression."""
    path = tmp_path / "bomb"
    path.write_bytes(COMPRESSORS[kind](tar(file("zeros", bytes(20 << 20)))))
    with pytest.raises(ImageError, match="unpacks to more than"):
        opened(path, Limits(max_bytes=1 << 20))


def test_each_step_of_decompression_is_bounded() -> None:
    """One step yields at most some tens of MiB, whatever the ratio."""
    bomb = COMPRESSORS["zstd"](bytes(256 << 20))
    assert max(len(piece) for piece in Decompressor(bomb[:6]).feed(bomb)) <= 64 << 20


def header(kind: bytes, size: int, name: bytes = b"x") -> bytes:
    """Return one raw tar header with a valid checksum and any size, even a negative one."""
    field = (
        b"%011o\0" % size
        if 0 <= size < 8**11
        else (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    )
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0")
    block += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "data",
    [
        header(tarfile.XHDTYPE, -512) * 3,
        header(tarfile.REGTYPE, -1024) * 3,
        header(tarfile.GNUTYPE_LONGNAME, -512) * 3,
        header(tarfile.XHDTYPE, 1 << 33) + bytes(1024),
        header(tarfile.GNUTYPE_LONGNAME, 1 << 40) + bytes(1024),
        header(tarfile.REGTYPE, 1 << 60) + bytes(1024),
        header(tarfile.XHDTYPE, 100_000) + b"1" * 100_352 + header(tarfile.REGTYPE, 0) + bytes(1024),
        header(tarfile.XHDTYPE, 512) + b"0 path=x\n".ljust(512, b"\0") + header(tarfile.REGTYPE, 0) + bytes(1024),
        (header(tarfile.XHDTYPE, 512) + b"9 path=x\n".ljust(512, b"\0")) * 3000 + bytes(1024),
    ],
    ids=[
        "pax-back",
        "file-back",
        "longname-back",
        "pax-huge",
        "longname-huge",
        "file-huge",
        "digits",
        "zero-length",
        "nested-pax",
    ],
)
@pytest.mark.timeout(10)
def test_lying_headers_are_refused_quickly(tmp_path: Path, data: bytes) -> None:
    """A header that points backwards, claims an absurd size or stalls the parser gives an
    ImageError, quickly.
    """
    path = tmp_path / "lie"
    path.write_bytes(data)
    with pytest.raises(ImageError):
        opened(path)


def test_sparse_members_are_read_with_zeros_for_holes(tmp_path: Path) -> None:
    """A sparse file of GNU tar is read completely, with zeros for the holes."""
    with (tmp_path / "sparse").open("wb") as out:
        out.seek(1 << 20)
        out.write(b"end")
    for form in ("gnu", "pax"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(
            ["tar", "--sparse", f"--format={form}", "-C", str(tmp_path), "-cf", str(path), "sparse"], check=True
        )
        assert path.stat().st_size < 100_000
        with workspace(tmp_path) as space:
            tree = FileTree()
            apply_archive(tree, open_archive(path, space), whiteouts=False)
            assert text(tree, "sparse") == bytes(1 << 20) + b"end"


def test_attributes_are_read_from_pax_headers(tmp_path: Path) -> None:
    """File capabilities and other attributes are read in the forms of GNU tar, Docker and umoci,
    including binary values.
    """
    info, data = file("ping", b"elf")
    info.pax_headers = {"SCHILY.xattr.security.capability": b"\x01\0\0\x02\xff\n=".decode("utf-8", "surrogateescape")}
    with workspace(tmp_path) as space:
        tree = apply_layers(space, tar((info, data)))
        node = tree.find((b"ping",))
        assert node is not None
        assert node.xattrs == {b"security.capability": b"\x01\0\0\x02\xff\n="}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_an_image_error(tmp_path: Path, data: st.DataObject) -> None:
    """An archive with any changed bytes is read or refused with an ImageError; the parser raises
    nothing else.
    """
    info, content = file("some/file", b"content")
    info.pax_headers = {"SCHILY.xattr.user.k": "v", "GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    raw = bytearray(tar((info, content), file("z" * 150), directory("d")))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with workspace(tmp_path) as space:
        try:
            tree = FileTree()
            apply_archive(tree, Archive(io.BytesIO(bytes(raw)), space, must_end=True), whiteouts=True)
            for _, _, node in tree.walk():
                if node.content and node.content.size < 1 << 20:
                    assert len(b"".join(node.content.chunks(0, node.content.size))) == node.content.size
        except ImageError:
            return
