"""Copies between host and guest follow the naming rules of cp, and keep what a tree has."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_process import agent_session, names
from coppice.agent.copy import copy_in, copy_out
from coppice.agent.pack import pack
from coppice.agent.session import Session
from coppice.errors import (
    GuestRefused,
    HostCannot,
    NotFound,
    UnsafePath,
    UsageError,
)
from coppice.model import Progress
from coppice.model.guest import Unpacked


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    async with agent_session() as session:
        yield session


def plant(root: Path) -> None:
    """Make a tree with harmless links of all kinds."""
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "file").write_bytes(os.urandom(300_000))
    (root / "a" / "file").chmod(0o754)
    (root / "a" / "b" / ("long" * 50)).write_bytes(b"long")
    (root / "a" / "soft").symlink_to("file")
    (root / "a" / "b" / "up").symlink_to("../file")
    os.link(root / "a" / "file", root / "hard")
    (root / "empty").mkdir()


def describe(root: Path) -> dict[str, tuple[int, object]]:
    """Return names, modes and contents, for comparison."""
    return {
        str(path.relative_to(root)): (
            stat.S_IMODE(path.lstat().st_mode),
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("target", ["pipe", "link", "."])
async def test_no_copy_replaces_a_pipe_or_device(session: Session, tmp_path: Path, way: str, target: str) -> None:
    """`coppice cp NAME:FILE /dev/null` must leave /dev/null as it is, for all programs of the host."""
    there = tmp_path / "there"
    there.mkdir()
    os.mkfifo(there / "pipe")
    (there / "link").symlink_to("pipe")
    (tmp_path / "pipe").write_text("content")
    with pytest.raises(UsageError, match=r"pipe is a device, a pipe or a socket|link is a device"):
        await (copy_in if way == "in" else copy_out)(session, str(tmp_path / "pipe"), str(there / target))
    assert (there / "pipe").is_fifo()
    assert (there / "link").is_symlink()


async def test_no_tree_replaces_a_pipe_or_device_of_the_host(session: Session, tmp_path: Path) -> None:
    """Nor does one that is deep in a tree."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "pipe").write_text("content")
    (tmp_path / "there" / "tree" / "deep").mkdir(parents=True)
    os.mkfifo(tmp_path / "there" / "tree" / "deep" / "pipe")
    with pytest.raises(UnsafePath, match="in place of a device"):
        await copy_out(session, str(tmp_path / "tree"), tmp_path / "there")
    assert (tmp_path / "there" / "tree" / "deep" / "pipe").is_fifo()


async def test_a_tree_survives_a_copy_in_and_out(session: Session, tmp_path: Path) -> None:
    """A tree copied in and out again keeps its names, contents, modes and links."""
    plant(tmp_path / "tree")
    (tmp_path / "guest").mkdir()
    result = await copy_in(session, tmp_path / "tree", str(tmp_path / "guest"))
    assert describe(tmp_path / "guest" / "tree") == describe(tmp_path / "tree")
    assert result.content_bytes == 300_004
    (tmp_path / "host").mkdir()
    assert await copy_out(session, str(tmp_path / "guest" / "tree"), tmp_path / "host") == 300_004
    assert describe(tmp_path / "host" / "tree") == describe(tmp_path / "tree")
    assert (tmp_path / "host/tree/hard").stat().st_nlink == 2


async def test_directories_keep_their_times_in_both_directions(session: Session, tmp_path: Path) -> None:
    """Although their entries are made in them later."""
    directories = ["a", "a/b", "a/b/c", "d"]
    for at in directories:
        (tmp_path / "tree" / at).mkdir(parents=True)
        (tmp_path / "tree" / at / "file").write_bytes(b"x")
    for number, at in enumerate(["", *directories]):
        os.utime(tmp_path / "tree" / at, (1_000_000_000 + number, 1_000_000_000 + number))

    def times(root: Path, *others: str) -> list[float]:
        return [(root / at).stat().st_mtime for at in (*others, *directories)]

    await copy_in(session, tmp_path / "tree", str(tmp_path / "inside"))
    assert times(tmp_path / "inside", "") == times(tmp_path / "tree", "")
    await copy_out(session, str(tmp_path / "inside"), tmp_path / "back")
    assert times(tmp_path / "back", "") == times(tmp_path / "tree", "")
    (tmp_path / "contents").mkdir()
    await copy_out(session, f"{tmp_path}/inside/.", tmp_path / "contents")
    assert times(tmp_path / "contents") == times(tmp_path / "tree")


async def test_a_copy_reports_its_progress(session: Session, tmp_path: Path) -> None:
    """A copy reports progress until all bytes are copied; the total is unknown only for a tree
    copied out.
    """
    plant(tmp_path / "tree")
    (tmp_path / "tree" / "large").write_bytes(os.urandom(5 << 20))
    steps: list[Progress] = []
    for name, total in (("tree", 300_004 + (5 << 20)), ("tree/large", 5 << 20)):
        source, inside = tmp_path / name, str(tmp_path / f"inside-{Path(name).name}")
        for known, copy in (
            (total, copy_in(session, source, inside, progress=steps.append)),
            (None if name == "tree" else total, copy_out(session, inside, tmp_path / "back", progress=steps.append)),
        ):
            steps.clear()
            await copy
            assert {(step.stage, step.total, step.unit) for step in steps} == {("copy", known, "bytes")}
            done = [step.done for step in steps]
            assert done == sorted(set(done))
            assert done[0] == 0
            assert done[-1] >= total - (1 << 20) if known is None else done[-1] == total
            assert 5 <= len(done) <= 8


class Traffic:
    """Count the bytes that cross a session's port in uploads and downloads."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = self.received = 0
        tree_in, tree_out = session.tree_in, session.tree_out

        async def upload(directory: str, records: AsyncIterator[bytes]) -> Unpacked:
            async def counted() -> AsyncIterator[bytes]:
                async for chunk in records:
                    self.sent += len(chunk)
                    yield chunk

            return await tree_in(directory, counted())

        async def download(path: str, **options: bool) -> AsyncIterator[bytes]:
            async for chunk in tree_out(path, **options):
                self.received += len(chunk)
                yield chunk

        monkeypatch.setattr(session, "tree_in", upload)
        monkeypatch.setattr(session, "tree_out", download)


def write_ranges(path: Path, ranges: Iterable[tuple[int, int]], size: int) -> None:
    """Write a file of this size with data in the (offset, length) ranges and holes elsewhere."""
    with path.open("wb") as file:
        for offset, length in ranges:
            file.seek(offset)
            file.write(os.urandom(length))
        file.truncate(size)


async def test_a_sparse_file_stays_sparse(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file keeps its contents and its holes in both directions, and its zeros are not
    sent.
    """
    source, inside, back = (tmp_path / name for name in ("source", "inside", "back"))
    write_ranges(source, [(0, 5), (24 << 20, 6)], 48 << 20)
    traffic = Traffic(session, monkeypatch)
    assert (await copy_in(session, source, str(inside))).content_bytes == 48 << 20
    assert await copy_out(session, str(inside), back) == 48 << 20
    for copy in (inside, back):
        assert copy.read_bytes() == source.read_bytes()
        assert copy.stat().st_blocks * 512 < 1 << 20
    assert traffic.sent < 100_000
    assert traffic.received < 100_000


async def test_a_file_in_many_pieces_keeps_all_its_holes(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in thousands of pieces keeps its data and its holes, whichever side packs it."""
    source, inside, back = (tmp_path / name for name in ("source", "inside", "back"))
    places = (*range(0, 3000 * 0x11000, 0x11000), *range(1 << 30, 8 << 30, 1 << 30))
    write_ranges(source, ((offset, 100) for offset in places), 8 << 30)
    traffic = Traffic(session, monkeypatch)
    await copy_in(session, source, str(inside))
    await copy_out(session, str(inside), back)
    for copy in (inside, back):
        assert copy.stat().st_size == 8 << 30
        assert copy.stat().st_blocks <= source.stat().st_blocks
        with source.open("rb") as ours, copy.open("rb") as theirs:
            for offset in places:
                assert os.pread(ours.fileno(), 4096, offset) == os.pread(theirs.fileno(), 4096, offset)
    for moved in (traffic.sent, traffic.received):
        assert moved < 3010 * 4200


async def test_files_without_a_size_are_copied_to_their_end(session: Session, tmp_path: Path) -> None:
    """A file of /proc or /sys claims another size than it has. Its copy has what can be read, in both
    directions.
    """
    for path in (Path("/proc/version"), Path("/sys/kernel/uevent_seqnum"), Path("/proc/cpuinfo")):
        await copy_in(session, path, str(tmp_path / "inside"))
        await copy_out(session, str(path), tmp_path / "outside")
        for copy in (tmp_path / "inside", tmp_path / "outside"):
            assert copy.read_bytes() == path.read_bytes() != b"" or path.name == "cpuinfo"  # its clock rates vary
            assert copy.stat().st_size > 0


async def test_a_file_that_shrinks_here_is_an_error(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of this machine that becomes shorter during its copy fails the copy, and is not padded."""
    for holes in (False, True):
        write_ranges(tmp_path / "file", [(0, 4 << 20)], 64 << 20 if holes else 4 << 20)
        shrunk = False

        def shrink(size: int) -> None:
            nonlocal shrunk
            if size and not shrunk:
                shrunk = True
                os.truncate(tmp_path / "file", 3 << 20)

        with pytest.raises(OSError, match="shorter"):
            list(pack(tmp_path / "file", "top", moved=shrink))


async def test_a_part_of_a_file_does_not_pass_for_the_file(session: Session, tmp_path: Path) -> None:
    """A copy that fails in the middle of a file, in either direction, leaves no part of
    it.
    """
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"whole")
    write_ranges(tree / "b", [(0, 4 << 20)], 4 << 20)

    def shrink(step: Progress) -> None:
        if step.done > 100 and (tree / "b").stat().st_size > 3 << 20:
            os.truncate(tree / "b", 3 << 20)

    with pytest.raises(HostCannot, match="shorter"):
        await copy_in(session, tree, str(tmp_path / "inside"), progress=shrink)
    assert "b" not in names(tmp_path / "inside")
    write_ranges(tree / "b", [(0, 4 << 20)], 4 << 20)
    with pytest.raises(GuestRefused, match="shorter"):
        await copy_out(session, str(tree), tmp_path / "outside", progress=shrink)
    assert "b" not in names(tmp_path / "outside")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 511, 4096, 65535, 65536, 70_000, 1 << 20]),  # a hole,
            st.binary(max_size=600),  # data,
            st.sampled_from([0, 1, 512, 4096, 5000]),  # written zeros
        ),
        max_size=12,
    ),
    tail=st.sampled_from([0, 1, 4096, 1 << 20]),
)
def test_any_sparse_file_survives_a_copy_in_and_out(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bytes, int]], tail: int
) -> None:
    """The real agent returns any sequence of holes, data and written zeros byte for byte."""
    directory = tmp_path_factory.mktemp("sparse")
    source, inside, back = (directory / name for name in ("source", "inside", "back"))
    with source.open("wb") as file:
        for hole, data, zeros in pieces:
            file.seek(hole, os.SEEK_CUR)
            file.write(data + bytes(zeros))
        file.truncate(file.tell() + tail)

    async def copy() -> None:
        async with agent_session("sanitized") as session:
            await copy_in(session, source, str(inside))
            await copy_out(session, str(inside), back)

    asyncio.run(copy())
    assert inside.read_bytes() == source.read_bytes()
    assert back.read_bytes() == source.read_bytes()


async def test_copies_are_named_as_cp_names_them(session: Session, tmp_path: Path) -> None:
    """A copy into an existing directory keeps the old name; any other copy gets the new one."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "guest").mkdir()
    guest = str(tmp_path / "guest")
    await copy_in(session, tmp_path / "file", guest)
    await copy_in(session, tmp_path / "file", guest + "/renamed")
    assert names(guest) == ["file", "renamed"]
    (tmp_path / "host").mkdir()
    await copy_out(session, guest + "/renamed", tmp_path / "host")
    await copy_out(session, guest + "/renamed", tmp_path / "host" / "again")
    await copy_out(session, guest, tmp_path / "host" / "tree")
    assert names(tmp_path / "host") == ["again", "renamed", "tree"]
    assert (tmp_path / "host/tree/file").read_bytes() == b"x"
    # an existing file is replaced
    await copy_out(session, guest + "/file", tmp_path / "host" / "again")
    assert (tmp_path / "host/again").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can set owners")
async def test_owners_are_kept_when_asked(session: Session, tmp_path: Path) -> None:
    """A copy belongs to root in the guest, unless its owners are kept."""
    (tmp_path / "file").write_bytes(b"x")
    os.chown(tmp_path / "file", 1000, 1001)
    for keep, owner in ((False, (0, 0)), (True, (1000, 1001))):
        await copy_in(session, tmp_path / "file", str(tmp_path / "copy"), keep_owners=keep)
        status = (tmp_path / "copy").stat()
        assert (status.st_uid, status.st_gid) == owner


async def test_a_missing_source_or_directory_is_an_error(session: Session, tmp_path: Path) -> None:
    """A missing source or directory is reported on either side, and the failed copy leaves nothing."""
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotFound):
        await copy_in(session, tmp_path / "missing", "/tmp")
    with pytest.raises(NotFound):
        await copy_in(session, tmp_path / "file", str(tmp_path / "no" / "such" / "file"))
    with pytest.raises(GuestRefused):
        await copy_out(session, str(tmp_path / "missing"), tmp_path / "new")
    with pytest.raises(NotFound):
        await copy_out(session, str(tmp_path / "file"), tmp_path / "no" / "such" / "directory")
    assert names(tmp_path) == ["file"]
    assert (await session.exec(["true"])).exit_code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
async def test_a_device_of_the_guest_is_refused(session: Session, tmp_path: Path) -> None:
    """The host's error does not hide the guest's, nor the guest's the host's."""
    os.mknod(tmp_path / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with pytest.raises(UnsafePath):
        await copy_out(session, str(tmp_path / "device"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


async def test_an_unreadable_source_is_an_error_of_the_host(session: Session, tmp_path: Path) -> None:
    """An error of the host is reported as such, not as the guest's error about a broken archive."""
    with pytest.raises(HostCannot):  # its first page cannot be read
        await copy_in(session, Path("/proc/self/mem"), str(tmp_path / "copy"))
