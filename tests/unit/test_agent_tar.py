"""Tar archives of a guest's files: other tools read them, and theirs are unpacked."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_process import BUILDS, agent_session, names
from coppice.agent import records
from coppice.agent.copy import archive_in, archive_out
from coppice.agent.records import Content, End, Entry
from coppice.agent.session import Session
from coppice.agent.tar import from_tar, to_tar
from coppice.errors import CoppiceError, GuestProtocolError, UnsafePath, UsageError
from guest_trees import describe, plant

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can set owners and make devices")


@pytest.fixture(params=BUILDS)
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with agent_session(request.param) as session:
        yield session


def archive(*members: tuple[tarfile.TarInfo, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar archive of these members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_) as tar:
        for info, data in members:
            info.size = len(data) or info.size
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, /, **fields: object) -> tarfile.TarInfo:
    """Return a header with these fields, owned by the user that runs the tests."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid = kind, 0o644, os.geteuid(), os.getegid()
    for field, value in fields.items():
        setattr(info, field, value)
    return info


async def chunks(data: bytes, size: int = 70_000) -> AsyncIterator[bytes]:
    """Yield bytes in pieces."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def tar_of(session: Session, path: str) -> bytes:
    """Return a tar archive of a path of the guest."""
    received = bytearray()

    async def take(chunk: bytes) -> None:
        received.extend(chunk)

    await archive_out(session, path, take)
    return bytes(received)


async def test_other_tools_can_read_the_archive(session: Session, tmp_path: Path) -> None:
    """Python's tarfile finds the same members."""
    plant(tmp_path / "tree")
    packed = await tar_of(session, f"{tmp_path}/tree/.")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        members = {info.name for info in tar}
        inside = tar.extractfile("binary" if tar.getmember("binary").isreg() else "hard")
        assert inside is not None
        assert inside.read() == (tmp_path / "tree" / "binary").read_bytes()
    assert members == set(describe(tmp_path / "tree"))


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_archives_of_other_tools_are_read(session: Session, tmp_path: Path, format_: int) -> None:
    """The formats of Python and GNU tar are unpacked, including each format's long names."""
    long = "d" * 90 + "/" + "n" * 60
    members = [
        (member("dir", tarfile.DIRTYPE, mode=0o750, mtime=1_000_000_000), b""),
        (member("dir/file", mode=0o600, mtime=1_200_000_000), b"data" * 1000),
        (member(long), b"long"),
        (member("dir/link", tarfile.SYMTYPE, linkname="file"), b""),
        (member("dir/hard", tarfile.LNKTYPE, linkname="dir/file"), b""),
    ]
    await archive_in(session, chunks(archive(*members, format_=format_)), str(tmp_path))
    assert (tmp_path / "dir/file").read_bytes() == b"data" * 1000
    assert (tmp_path / long).read_bytes() == b"long"
    assert (tmp_path / "dir/link").readlink() == Path("file")
    assert (tmp_path / "dir/hard").stat().st_ino == (tmp_path / "dir/file").stat().st_ino
    assert (tmp_path / "dir/file").stat().st_mtime == 1_200_000_000
    assert (tmp_path / "dir").stat().st_mtime == 1_000_000_000
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o750


@as_root
async def test_owners_are_set_and_devices_made(session: Session, tmp_path: Path) -> None:
    """Owners are set, even numbers that ustar's octal fields cannot hold, and devices are made."""
    info = member("zero", tarfile.CHRTYPE, devmajor=1, devminor=5, mode=0o620)
    packed = archive((info, b""), (member("file", uid=3_000_000, gid=7), b"x"))
    await archive_in(session, chunks(packed), str(tmp_path))
    status = (tmp_path / "file").stat()
    assert (status.st_uid, status.st_gid) == (3_000_000, 7)
    device = (tmp_path / "zero").stat()
    assert (device.st_rdev, stat.S_IMODE(device.st_mode)) == (os.makedev(1, 5), 0o620)
    with tarfile.open(fileobj=io.BytesIO(await tar_of(session, f"{tmp_path}/."))) as tar:
        assert tar.getmember("file").uid == 3_000_000
        assert tar.getmember("zero").devminor == 5


MAPS = {
    "in order": ("0,3,70000,2,100000,0", True),
    "empty ranges": ("0,0,5,0,5,5,100000,0", True),
    "only holes": ("100000,0", False),  # although the member has data
    "too little": ("0,3,100000,0", False),
    "too much": ("0,3,70000,3,100000,0", False),
    "backwards": ("70000,3,0,2", False),
    "over each other": ("0,3,2,2", False),
    "beyond the end": ("0,3,99999,2", False),
    "wraps": ("0,3,5,18446744073709551615,10,2", False),
    "ends in the middle": ("0,3,70000", False),
    "trailing comma": ("0,5,", False),
    "negative": ("-5,5", False),
    "no number": ("0,x", False),
    "nothing": ("", False),
    "many": ("0,0," * 1024 + "0,5,100000,0", True),
}


@pytest.mark.parametrize("case", list(MAPS))
async def test_only_a_valid_map_of_holes_is_followed(session: Session, tmp_path: Path, case: str) -> None:
    """A map of holes in order is followed. Any other map is refused, and not applied to the next
    file.
    """
    text, valid = MAPS[case]
    headers = {"GNU.sparse.size": "100000", "GNU.sparse.map": text}
    members = ((member("file", pax_headers=headers), b"abcde"), (member("next"), b"next"))
    if valid:
        offsets = [int(number) for number in text.split(",")]
        expected, data = bytearray(100_000), iter(b"abcde")
        for offset, length in zip(offsets[::2], offsets[1::2], strict=True):
            expected[offset : offset + length] = bytes(next(data) for _ in range(length))
        result = await archive_in(session, chunks(archive(*members)), str(tmp_path))
        assert (tmp_path / "file").read_bytes() == expected
        assert (tmp_path / "next").read_bytes() == b"next"
        assert result.content_bytes == 100_004
        return
    with pytest.raises(UsageError):
        await archive_in(session, chunks(archive(*members)), str(tmp_path))
    assert names(tmp_path) == []


async def test_a_map_of_holes_applies_to_one_member(session: Session, tmp_path: Path) -> None:
    """A link's map of holes does not apply to the file that follows."""
    headers = {"GNU.sparse.size": "100000", "GNU.sparse.map": "99996,4"}
    link = member("link", tarfile.SYMTYPE, linkname="x", pax_headers=headers)
    await archive_in(session, chunks(archive((link, b""), (member("next"), b"next"))), str(tmp_path))
    assert (tmp_path / "next").read_bytes() == b"next"


async def test_a_truncated_archive_is_refused(session: Session, tmp_path: Path) -> None:
    """An archive without its end is an error, wherever it was cut."""
    whole = archive((member("file"), b"x" * 5000))
    for size in (0, 100, 512, 700, 5000, 512 + 5120):
        with pytest.raises(UsageError):
            await archive_in(session, chunks(whole[:size]), str(tmp_path))


async def test_bytes_that_are_not_an_archive_are_refused(session: Session, tmp_path: Path) -> None:
    """Bytes that are not an archive are refused, and nothing is made of them."""
    with pytest.raises(UsageError):
        await archive_in(session, chunks(b"\7" + os.urandom(1 << 20)), str(tmp_path))
    assert names(tmp_path) == []


@pytest.mark.parametrize("headers", [{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"GNU.sparse.numblocks": "1"}])
def test_other_sparse_formats_are_refused(headers: dict[str, str]) -> None:
    """Their files would silently have other content."""
    with pytest.raises(UsageError, match="holes"):
        list(from_tar(io.BytesIO(archive((member("file", pax_headers=headers), b"data")))))


async def test_a_sparse_file_is_whole_in_an_archive(session: Session, tmp_path: Path) -> None:
    """Holes become zeros, which any tool reads."""
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(300_000)
        file.write(b"data")
        file.truncate(1_000_001)
    with tarfile.open(fileobj=io.BytesIO(await tar_of(session, str(tmp_path / "sparse")))) as tar:
        inside = tar.extractfile("sparse")
        assert inside is not None
        assert inside.read() == (tmp_path / "sparse").read_bytes()


async def test_a_file_without_a_size_is_whole_in_an_archive(session: Session) -> None:
    """The header of a file of /proc has the number of bytes that could be read."""
    with tarfile.open(fileobj=io.BytesIO(await tar_of(session, "/proc/version"))) as tar:
        inside = tar.extractfile("version")
        assert inside is not None
        assert inside.read() == Path("/proc/version").read_bytes() != b""


@pytest.mark.parametrize(
    "items",
    [
        [Entry("f", "f", size=5), Content(0, b"four"), End(4)],
        [Entry("f", "f", size=3), Content(0, b"four"), End(4)],
        [Entry("f", "f", size=3), Content(0, b"fou")],
        [End(3)],
        [Entry("f", "f"), End(1 << 40)],
        [Entry("f", "f"), *(Content(at, bytes(65528)) for at in range(0, 65 << 20, 65528)), End(65 << 20)],
    ],
)
def test_a_guest_cannot_break_an_archive(items: list[records.Item]) -> None:
    """A file of another size than its entry says is an error: what follows would be read as a header. A file
    without a size has a bound, since its size comes first in an archive.
    """
    with pytest.raises(GuestProtocolError):
        to_tar(items, io.BytesIO())


@pytest.mark.parametrize(
    "entry",
    [
        Entry("/etc/passwd", "d"),
        Entry("a/../../b", "d"),
        Entry("a", "h", link="../b"),
        Entry("", "d"),
        Entry("a\0b", "d"),
    ],
)
def test_an_archive_of_a_hostile_guest_stays_below_its_directory(entry: Entry) -> None:
    """No member of an archive is outside the directory into which it is unpacked."""
    with pytest.raises(UnsafePath):
        to_tar([entry], io.BytesIO())


def test_an_oversized_header_is_refused() -> None:
    """An extended header of a terabyte is refused before it is read."""
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 1 << 40
        with pytest.raises(UsageError):
            list(from_tar(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))))


@pytest.mark.parametrize("field", ["uid", "gid", "size"])
def test_a_negative_number_is_refused(field: str) -> None:
    """A negative size or owner is refused."""
    info = member("file", **{field: -(1 << 40)})
    with pytest.raises(UsageError):
        list(from_tar(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 6143), st.integers(0, 255)), max_size=6),
    fix=st.booleans(),
    size=st.integers(0, 8000),
)
def test_a_damaged_archive_gives_items_or_an_error(edits: list[tuple[int, int]], fix: bool, size: int) -> None:
    """Any bytes in a header give items that can be encoded, or one of Coppice's errors."""
    data = bytearray(
        archive(
            (member("dir", tarfile.DIRTYPE), b""),
            (member("n" * 120), b"contents"),
            (
                member("sparse", pax_headers={"GNU.sparse.size": "700000", "GNU.sparse.map": "9,8,90000,3,700000,0"}),
                b"sparse data",
            ),
            (member("l", tarfile.SYMTYPE, linkname="dir"), b""),
        )
    )
    for at, value in edits:
        if at < len(data):
            data[at] = value
    if fix:  # headers with a valid checksum reach more of the parser
        for start in range(0, len(data), 512):
            if data[start + 257 : start + 262] == b"ustar":
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    stream = io.BytesIO()
    with contextlib.suppress(CoppiceError):
        records.write(from_tar(io.BytesIO(data[: size or len(data)])), stream)
        stream.seek(0)
        list(records.read(stream))
