"""Files through the real agent: contents come back unchanged, and a failure leaves nothing
half-done.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_process import BUILDS, agent_session, names, running_agent
from agent_requests import APPEND, read_range, write_with
from coppice.agent.channel import Channel
from coppice.agent.protocol import FrameType, encode_fields
from coppice.agent.session import Session
from coppice.errors import GuestError, GuestRefused


@pytest.fixture(params=BUILDS)
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with agent_session(request.param) as session:
        yield session


@pytest.mark.parametrize("size", [0, 1, 32762, 65536, 3_000_001])
async def test_a_file_comes_back_as_it_was_written(session: Session, tmp_path: Path, size: int) -> None:
    """Files of any size come back unchanged, including sizes around frames and windows."""
    path, data = str(tmp_path / "new" / "deep" / "file"), os.urandom(size)
    await session.write_file(path, data)
    assert await session.read_file(path) == data
    assert Path(path).read_bytes() == data
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o644


async def test_a_range_of_a_file_is_read(session: Session, tmp_path: Path) -> None:
    """A read honours offset and length, and returns nothing beyond the end."""
    (tmp_path / "file").write_bytes(bytes(range(256)))
    path = str(tmp_path / "file")
    assert await read_range(session, path, 16, 4) == bytes(range(16, 20))
    assert await read_range(session, path, 250) == bytes(range(250, 256))
    assert await read_range(session, path, 1000) == b""


async def test_a_whole_file_has_a_size_bound(session: Session, tmp_path: Path) -> None:
    """Reading a whole file is bounded."""
    (tmp_path / "file").write_bytes(bytes(100_000))
    with pytest.raises(GuestError):
        await session.read_file(str(tmp_path / "file"), max_bytes=99_999)
    assert (await session.stat(str(tmp_path / "file"))).size_bytes == 100_000


async def test_a_write_replaces_the_file_and_keeps_its_mode(session: Session, tmp_path: Path) -> None:
    """A new file replaces the old one in one step and keeps its mode; a process with the old file
    open still reads the old contents.
    """
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


async def test_appended_bytes_come_last(session: Session, tmp_path: Path) -> None:
    """Appended bytes follow the existing ones; a missing file is made."""
    path = str(tmp_path / "log")
    await write_with(session, path, b"one ", APPEND)
    await write_with(session, path, b"two", APPEND)
    assert await session.read_file(path) == b"one two"


@pytest.mark.parametrize("build", BUILDS)
async def test_an_interrupted_upload_leaves_nothing(build: str, tmp_path: Path) -> None:
    """A host that disconnects during an upload leaves the old file and no temporary one."""
    (tmp_path / "file").write_bytes(b"old")
    async with running_agent(build) as agent:
        channel = await Channel.over(agent.sock, 20.0)
        stream = await channel.open(FrameType.FILE_WRITE, encode_fields([(1, str(tmp_path / "file"))]))
        await stream.send_data(FrameType.DATA, bytes(1 << 20))  # more than the window, so it has begun to write
        await channel.close()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("path", "number"),
    [("missing", errno.ENOENT), ("", errno.EISDIR), ("fifo", errno.EINVAL), ("file/x", errno.ENOTDIR)],
)
async def test_an_unreadable_path_has_the_guests_errno(
    session: Session, tmp_path: Path, path: str, number: int
) -> None:
    """A path that is not a readable file is refused with the guest's errno, and does not block."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(GuestRefused) as caught:
        await session.read_file(str(tmp_path / path))
    assert caught.value.errno == number


async def test_an_unwritable_path_has_the_guests_errno(session: Session, tmp_path: Path) -> None:
    """The error arrives, whatever the size of the upload."""
    for path, number in ((str(tmp_path), errno.EISDIR), (str(tmp_path / ("x" * 300)), errno.ENAMETOOLONG)):
        with pytest.raises(GuestRefused) as caught:
            await session.write_file(path, bytes(1 << 20))
        assert caught.value.errno == number
    with pytest.raises(GuestRefused):
        await write_with(session, str(tmp_path / "no" / "parent"), b"", 0)


async def test_a_full_disk_is_reported(session: Session) -> None:
    """An error during the write reaches the host."""
    with pytest.raises(GuestRefused) as caught:
        await session.write_file("/dev/full", bytes(1 << 20))
    assert caught.value.errno == errno.ENOSPC


async def test_stat_reports_each_kind_of_file(session: Session, tmp_path: Path) -> None:
    """The result is the guest kernel's for each kind of file."""
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


@pytest.mark.parametrize("number", [(1 << 32) - 1, 1 << 32, (1 << 32) + 4242])
async def test_an_owner_that_no_file_can_have_is_refused(session: Session, tmp_path: Path, number: int) -> None:
    """A number that is too large is refused: truncated, it would be another user's."""
    path = tmp_path / "file"
    for uid, gid in ((number, None), (None, number)):
        with pytest.raises(GuestRefused) as caught:
            await write_with(session, str(path), b"contents", owner=(uid, gid))
        assert caught.value.errno == errno.EINVAL
    assert not path.exists()
