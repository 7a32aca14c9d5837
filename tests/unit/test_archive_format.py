"""Archives survive any content and any cut into chunks, and a reader survives any archive."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.archive.files import save
from coppice.archive.format import BLOCK, DIGESTS, MANIFEST, Manifest, header
from coppice.archive.reader import Receiver, Target, manifest_in
from coppice.archive.writer import archive, source_of
from coppice.errors import CoppiceError, ImageError, IntegrityError
from coppice.linux.files import allocated_bytes
from coppice.model import Image, ImageConfig, no_progress
from coppice.vmm.qemu import qcow2
from fakes.records import make_instance

PAGE = 4096
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # each file is synced
IMAGE = Image(digest="sha256:" + "0" * 64, name="tiny", size_bytes=1, config=ImageConfig(), source="", created_at=0.0)

pages = st.lists(st.sampled_from([b"\0" * PAGE, b"\1" * PAGE, b"\0" * 100 + b"x" * (PAGE - 100)]), max_size=40)
contents = st.lists(st.tuples(pages, st.binary(max_size=700)).map(lambda each: b"".join(each[0]) + each[1]), max_size=4)


def written(directory: Path, files: list[bytes]) -> bytes:
    """Return an archive of files with these contents. Zeros at their ends are holes."""
    sources = []
    for number, content in enumerate(files):
        path = directory / f"source{number}"
        with path.open("wb") as file:
            file.write(content.rstrip(b"\0"))
            file.truncate(len(content))
        sources.append(source_of(path, path.name))
    manifest = Manifest(
        coppice="1",
        exported_at=0.0,
        template=make_instance(),
        image=IMAGE,
        kernel_sha256="",
        files=tuple(source.file for source in sources),
    )
    return b"".join(archive(manifest, sources))


def read(directory: Path, content: bytes, chunk: int = 1 << 20) -> tuple[str, ...]:
    """Receive an archive in chunks of this size; return the digests."""
    found = manifest_in(bytearray(content))
    if found is None:
        raise ImageError("no manifest")
    manifest, at = found
    targets = [Target(file, directory / f"target{number}") for number, file in enumerate(manifest.files)]
    with Receiver(targets) as receiver:
        for begin in range(at, len(content), chunk):
            receiver.feed(content[begin : begin + chunk])
        return receiver.finish()


@settings(max_examples=60, deadline=None)
@given(files=contents, chunk=st.integers(1, 5000))
def test_what_is_written_is_read(files: list[bytes], chunk: int) -> None:
    """Contents and digests are the same however the stream is cut, and zeros take no space."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        directory = Path(name)
        content = written(directory, files)
        assert read(directory, content, chunk) == tuple(hashlib.sha256(each).hexdigest() for each in files)
        for number, each in enumerate(files):
            made = directory / f"target{number}"
            assert made.read_bytes() == each
            assert made.stat().st_mode & 0o222 == 0
            if not any(each):
                assert allocated_bytes(made) == 0
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            listed = tar.getnames()
        assert (listed[0], listed[-1]) == (MANIFEST, DIGESTS)


@settings(max_examples=150, deadline=None)
@given(
    files=contents,
    changes=st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=600)), min_size=1, max_size=4),
    cut=st.integers(0),
)
def test_any_other_archive_is_refused_or_the_same(
    files: list[bytes], changes: list[tuple[int, bytes]], cut: int
) -> None:
    """Bytes are replaced anywhere, and the end is cut off. Nothing but the targets is ever made."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        directory, content = Path(name), bytearray(written(Path(name), files))
        for at, new in changes:
            place = at % len(content)
            content[place : place + len(new)] = new
        del content[len(content) - cut % 2 * (cut % len(content)) :]
        try:
            digests = read(directory, bytes(content))
        except CoppiceError:
            pass
        else:
            assert digests == tuple(hashlib.sha256(each).hexdigest() for each in files)[: len(digests)]
        made = {path.name for path in directory.iterdir()}
        assert made <= {f"{kind}{number}" for kind in ("source", "target") for number in range(len(files))}


def test_a_file_never_gets_more_data_than_was_declared(tmp_path: Path) -> None:
    """Each range counts, before its content arrives."""
    content = written(tmp_path, [b"x" * PAGE])
    _, at = manifest_in(bytearray(content)) or (None, 0)
    more = content[:at] + header("data/0/0", 1 << 32) + bytes(BLOCK)
    with pytest.raises(ImageError, match="other ranges"):
        read(tmp_path, more)


def test_a_layer_that_names_another_file_is_refused(tmp_path: Path) -> None:
    """QEMU would open the external data file that a header names (incompatible feature 2)."""
    usual = bytearray(512)
    usual[:8] = b"QFI\xfb\0\0\0\3"
    usual[20:24], usual[24:32] = (16).to_bytes(4, "big"), (1 << 20).to_bytes(8, "big")
    path = tmp_path / "overlay.1"
    for features, size, sound in (
        (16, 1 << 20, True),
        (17, 1 << 20, True),
        (16 | 4, 1 << 20, False),
        (16, 1 << 21, False),
    ):
        usual[72:80] = features.to_bytes(8, "big")
        path.write_bytes(usual)
        if sound:
            qcow2.check(path, size)
        else:
            with pytest.raises(IntegrityError, match="not a disk layer"):
                qcow2.check(path, size)


@pytest.mark.parametrize("named", [False, True])
async def test_a_killed_export_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """The archive has no name until it is whole, unless the file system cannot do that."""
    real = os.open

    def without(path: Path, flags: int, mode: int = 0o777, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no files without a name")
        return real(path, flags, mode, **more)

    if named:
        monkeypatch.setattr(os, "open", without)
    meanwhile: list[str] = []

    class Session:
        most_bytes = 4

        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"half"
            meanwhile.extend(path.name for path in tmp_path.iterdir())
            yield b"whole"

    (tmp_path / "old").write_text("old")
    assert await save(Session(), str(tmp_path / "old"), no_progress) == 9
    assert len(meanwhile) == 1 + named
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"halfwhole")]
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o600
