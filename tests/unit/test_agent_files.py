"""Files through the real agent: what goes in comes out, and a failure leaves nothing half-done."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_process import BUILDS, agent_session, names, running_agent
from coppice.errors import GuestError, GuestRefused
from coppice.guest.channel import Channel
from coppice.guest.protocol import FrameType, encode_fields, encode_request, encode_stream
from coppice.guest.session import Session


@pytest.fixture(params=BUILDS)
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with agent_session(request.param) as session:
        yield session


@pytest.mark.parametrize("size", [0, 1, 32762, 65536, 3_000_001])
async def test_a_file_comes_back_as_it_was_written(session: Session, tmp_path: Path, size: int) -> None:
    """Any size goes in and out, around the sizes of frames and windows too."""
    path, data = str(tmp_path / "new" / "deep" / "file"), os.urandom(size)
    await session.write_file(path, data)
    assert await session.read_file(path) == data
    assert Path(path).read_bytes() == data
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o644


async def test_a_part_of_a_file(session: Session, tmp_path: Path) -> None:
    """Offset and length are kept; beyond the end there is nothing."""
    (tmp_path / "file").write_bytes(bytes(range(256)))
    path = str(tmp_path / "file")
    assert await session.read_file(path, offset=16, length=4) == bytes(range(16, 20))
    assert await session.read_file(path, offset=250) == bytes(range(250, 256))
    assert await session.read_file(path, offset=1000) == b""
    assert await session.read_file(path, length=0) == b""


async def test_a_file_too_large_to_collect(session: Session, tmp_path: Path) -> None:
    """Reading whole is bounded."""
    (tmp_path / "file").write_bytes(bytes(100_000))
    with pytest.raises(GuestError):
        await session.read_file(str(tmp_path / "file"), max_bytes=99_999)
    assert (await session.stat(str(tmp_path / "file"))).size_bytes == 100_000


async def test_writing_replaces_whole_and_keeps_what_was_not_asked_for(session: Session, tmp_path: Path) -> None:
    """A new file takes the old one's place and mode in one step; the old one lives on where it is open."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o751)
    with path.open("rb") as old:
        await session.write_file(str(path), b"new contents")
        assert old.read() == b"old"
    assert path.read_bytes() == b"new contents"
    assert stat.S_IMODE(path.stat().st_mode) == 0o751
    await session.write_file(str(path), b"x", mode=0o4755)
    assert stat.S_IMODE(path.stat().st_mode) == 0o4755
    assert names(tmp_path) == ["file"]


async def test_writing_through_a_link_keeps_the_link(session: Session, tmp_path: Path) -> None:
    """The file that a link names is replaced, not the link."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    await session.write_file(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


async def test_appending(session: Session, tmp_path: Path) -> None:
    """Appended bytes come after those that are there; a file that is not there is made."""
    path = str(tmp_path / "log")
    await session.write_file(path, b"one ", append=True)
    await session.write_file(path, b"two", append=True)
    assert await session.read_file(path) == b"one two"


@pytest.mark.parametrize("build", BUILDS)
async def test_an_upload_that_breaks_off_leaves_nothing(build: str, tmp_path: Path) -> None:
    """A host that goes away in the middle leaves the old file, and no temporary one."""
    (tmp_path / "file").write_bytes(b"old")
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        request = encode_request(FrameType.FILE_WRITE, encode_fields([(1, str(tmp_path / "file"))]))
        await channel.begin(request + encode_stream(FrameType.DATA, bytes(32768)))
        assert (await channel.receive()).type == FrameType.WINDOW  # it has begun to write
        await channel.close()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("path", "number"),
    [("missing", errno.ENOENT), ("", errno.EISDIR), ("fifo", errno.EINVAL), ("file/x", errno.ENOTDIR)],
)
async def test_what_cannot_be_read_says_why(session: Session, tmp_path: Path, path: str, number: int) -> None:
    """A path that is no readable file is refused with the guest's errno, and does not block."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(GuestRefused) as caught:
        await session.read_file(str(tmp_path / path))
    assert caught.value.errno == number


async def test_what_cannot_be_written_says_why(session: Session, tmp_path: Path) -> None:
    """The error comes however much was to be sent."""
    for path, number in ((str(tmp_path), errno.EISDIR), (str(tmp_path / ("x" * 300)), errno.ENAMETOOLONG)):
        with pytest.raises(GuestRefused) as caught:
            await session.write_file(path, bytes(1 << 20))
        assert caught.value.errno == number
    with pytest.raises(GuestRefused):
        await session.write_file(str(tmp_path / "no" / "parent"), b"", make_parents=False)


async def test_a_full_disk_is_told(session: Session) -> None:
    """An error while writing reaches the host."""
    with pytest.raises(GuestRefused) as caught:
        await session.write_file("/dev/full", bytes(1 << 20))
    assert caught.value.errno == errno.ENOSPC


async def test_stat(session: Session, tmp_path: Path) -> None:
    """What the guest's kernel says of each kind of file arrives."""
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "file").chmod(0o640)
    os.utime(tmp_path / "file", ns=(0, -1_500_000_000))
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    found = await session.stat(str(tmp_path / "file"))
    assert (found.kind, found.size_bytes, found.mode, found.uid, found.mtime) == ("f", 5, 0o640, os.geteuid(), -1.5)
    assert found.link_target is None
    link = await session.stat(str(tmp_path / "link"))
    assert (link.kind, link.link_target) == ("l", "file")
    assert (await session.stat(str(tmp_path / "link"), follow=True)).kind == "f"
    assert (await session.stat(str(tmp_path))).kind == "d"
    assert (await session.stat(str(tmp_path / "pipe"))).kind == "p"
    assert (await session.stat("/dev/null")).kind == "c"
    with pytest.raises(GuestRefused) as caught:
        await session.stat(str(tmp_path / "missing"))
    assert caught.value.errno == errno.ENOENT
