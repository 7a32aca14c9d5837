"""Names in a guest through the real agent: list, make, move, remove, watch."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from agent_process import BUILDS, agent_session, names, running_agent
from coppice.agent.channel import Channel
from coppice.agent.protocol import Frame, FrameType, encode_fields
from coppice.agent.session import Session
from coppice.errors import GuestProtocolError, GuestRefused
from coppice.model import FileEvent
from fakes.wire import Peer, talking_to

DEADLINE_S = 20.0


@pytest.fixture(params=BUILDS)
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with agent_session(request.param) as session:
        yield session


async def refused(work: object) -> int:
    """Return the errno with which a request is refused."""
    with pytest.raises(GuestRefused) as caught:
        await work  # type: ignore[misc]
    return caught.value.errno


# ---- list ----


async def test_a_directory_is_listed(session: Session, tmp_path: Path) -> None:
    """Each entry has the status that `stat` gives; links are not followed."""
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / os.fsdecode(b"odd \xff\n")).touch()
    os.mkfifo(tmp_path / "pipe")
    found = [each async for each in session.listing(str(tmp_path))]
    assert sorted(each.path for each in found) == sorted(str(path) for path in tmp_path.iterdir())
    assert sorted(found, key=lambda each: each.path) == [
        await session.stat(path) for path in sorted(str(path) for path in tmp_path.iterdir())
    ]


async def test_a_huge_directory_is_listed_as_it_is_read(session: Session, tmp_path: Path) -> None:
    """Thousands of entries pass in pieces, and a list that is not read to its end stops the guest."""
    for n in range(20_000):
        (tmp_path / f"{n:05}").touch()
    found = [Path(each.path).name async for each in session.listing(str(tmp_path))]
    assert sorted(found) == [f"{n:05}" for n in range(20_000)]
    some = session.listing(str(tmp_path))
    await anext(some)
    await some.aclose()
    assert (await session.stat("/")).kind == "d"


async def test_what_is_no_directory_is_not_listed(session: Session, tmp_path: Path) -> None:
    """The guest's errno arrives."""
    (tmp_path / "file").touch()
    assert await refused(anext(session.listing(str(tmp_path / "file")))) == errno.ENOTDIR
    assert await refused(anext(session.listing(str(tmp_path / "missing")))) == errno.ENOENT


# ---- make, move, remove ----


async def test_a_directory_is_made(session: Session, tmp_path: Path) -> None:
    """The mode is exact, whatever the umask; parents and existing directories are accepted when asked."""
    path = tmp_path / "a" / "b"
    assert await refused(session.make_directory(str(path))) == errno.ENOENT
    await session.make_directory(f"{path}/", parents=True, mode=0o2770)
    assert stat.S_IMODE(path.stat().st_mode) == 0o2770
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert await refused(session.make_directory(str(path))) == errno.EEXIST
    await session.make_directory(str(path), parents=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o2770
    (tmp_path / "file").touch()
    assert await refused(session.make_directory(str(tmp_path / "file"), parents=True)) == errno.EEXIST


async def test_a_path_is_moved(session: Session, tmp_path: Path) -> None:
    """A move replaces a file in one step, unless it must not, and never mixes files and directories."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "inside").touch()
    a, b, directory = (str(tmp_path / name) for name in ("a", "b", "dir"))
    assert await refused(session.move(a, b, keep_existing=True)) == errno.EEXIST
    assert (tmp_path / "b").read_bytes() == b"b"
    await session.move(a, b)
    assert (tmp_path / "b").read_bytes() == b"a"
    assert await refused(session.move(a, b)) == errno.ENOENT
    assert await refused(session.move(b, directory)) == errno.EISDIR
    assert await refused(session.move(directory, b)) == errno.ENOTDIR
    await session.move(directory, f"{directory}2")
    assert names(tmp_path) == ["b", "dir2"]
    assert await refused(session.move(b, "/dev/shm/other-file-system")) == errno.EXDEV


async def test_a_path_is_removed(session: Session, tmp_path: Path) -> None:
    """Directories with content are removed only when asked, and a missing path is an error unless
    accepted.
    """
    for n in range(300):
        (tmp_path / "tree" / str(n % 7) / str(n)).mkdir(parents=True)
        (tmp_path / "tree" / str(n % 7) / str(n) / "file").touch()
    (tmp_path / "empty").mkdir()
    tree, empty = str(tmp_path / "tree"), str(tmp_path / "empty")
    assert await refused(session.remove(tree)) == errno.ENOTEMPTY
    await session.remove(empty)
    assert await refused(session.remove(empty)) == errno.ENOENT
    await session.remove(empty, missing_ok=True)
    await session.remove(tree, recursive=True)
    assert names(tmp_path) == []
    assert await refused(session.remove(tree, recursive=True)) == errno.ENOENT


async def test_a_removal_follows_no_links(session: Session, tmp_path: Path) -> None:
    """A link is removed, never its target, at the top and below it."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("../kept")
    (tmp_path / "link").symlink_to("kept")
    await session.remove(str(tmp_path / "tree"), recursive=True)
    assert await refused(session.remove(f"{tmp_path}/link/", recursive=True)) == errno.ENOTDIR
    await session.remove(str(tmp_path / "link"), recursive=True)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]


async def test_the_root_and_trees_too_deep_are_not_removed(session: Session, tmp_path: Path) -> None:
    """The root directory is refused before anything is removed. The recursion is bounded."""
    (tmp_path / "root").symlink_to("/")
    for path in ("/", "/.", "/usr/..", "//"):
        assert await refused(session.remove(path, recursive=True)) == errno.EBUSY
    assert Path("/usr").is_dir()
    assert await refused(session.remove(f"{tmp_path}/root/", recursive=True)) in (errno.EBUSY, errno.ENOTDIR)
    deep = tmp_path / "deep"
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    assert await refused(session.remove(str(deep), recursive=True)) == errno.ELOOP


# ---- watch ----


class Watched:
    """The events of a watch, relative to its directory."""

    def __init__(self, events: AsyncGenerator[FileEvent, None], root: Path) -> None:
        self.events = events
        self._root = root

    async def next(self) -> tuple[str, str]:
        async with asyncio.timeout(DEADLINE_S):
            event = await anext(self.events)
        return event.kind, os.path.relpath(event.path, self._root) + ("/" if event.is_directory else "")

    async def until(self, *wanted: tuple[str, str]) -> list[tuple[str, str]]:
        """Return the events up to the last of those wanted, all of which must come."""
        found: list[tuple[str, str]] = []
        missing = set(wanted)
        while missing:
            found.append(await self.next())
            missing.discard(found[-1])
        return found


async def watch(session: Session, path: Path, *, recursive: bool = False) -> Watched:
    """Begin to watch."""
    watched = Watched(session.watching(str(path), recursive=recursive), path)
    assert await watched.next() == ("watching", ".")
    return watched


async def test_changes_of_a_directory_are_reported(session: Session, tmp_path: Path) -> None:
    """Each change of an entry is an event, in order. A move has two with the same cookie."""
    watched = await watch(session, tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    assert [await watched.next() for _ in range(3)] == [("created", "file"), ("modified", "file"), ("closed", "file")]
    (tmp_path / "file").chmod(0o600)
    assert await watched.next() == ("attributes", "file")
    (tmp_path / "file").rename(tmp_path / "renamed")
    events = [await anext(watched.events), await anext(watched.events)]
    assert [event.kind for event in events] == ["moved_from", "moved_to"]
    assert events[0].cookie == events[1].cookie != 0
    (tmp_path / "renamed").unlink()
    assert await watched.next() == ("deleted", "renamed")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "inside").touch()  # one directory only, so not reported
    (tmp_path / "dir" / "inside").unlink()
    (tmp_path / "dir").rmdir()
    assert [await watched.next() for _ in range(2)] == [("created", "dir/"), ("deleted", "dir/")]
    await watched.events.aclose()


async def test_changes_of_a_file_are_reported_until_it_is_gone(session: Session, tmp_path: Path) -> None:
    """The stream of a file that was removed, or of a directory that was moved, ends with `gone`."""
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    watched = await watch(session, tmp_path / "file")
    with (tmp_path / "file").open("ab") as file:
        file.write(b"x")
    assert [await watched.next() for _ in range(2)] == [("modified", "."), ("closed", ".")]
    moved = await watch(session, tmp_path / "dir", recursive=True)
    (tmp_path / "file").unlink()
    (tmp_path / "dir").rename(tmp_path / "other")
    assert (await watched.until(("gone", ".")))[-1] == ("gone", ".")
    assert await moved.next() == ("gone", ".")
    for each in (watched, moved):
        with pytest.raises(StopAsyncIteration):
            await anext(each.events)


async def test_new_directories_are_watched_too(session: Session, tmp_path: Path) -> None:
    """Nothing is missed below a directory that appears, however it does and however fast it is filled."""
    (tmp_path / "tree" / "old").mkdir(parents=True)
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "there").touch()
    watched = await watch(session, tmp_path / "tree", recursive=True)
    (tmp_path / "tree" / "old" / "file").touch()
    await watched.until(("created", "old/file"))
    (tmp_path / "tree" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "b" / "c" / "file").touch()
    await watched.until(("created", "a/"), ("created", "a/b/"), ("created", "a/b/c/"), ("created", "a/b/c/file"))
    (tmp_path / "tree" / "a" / "b" / "c" / "later").touch()
    await watched.until(("created", "a/b/c/later"))
    (tmp_path / "outside").rename(tmp_path / "tree" / "in")
    await watched.until(("moved_to", "in/"), ("created", "in/deep/"), ("created", "in/deep/there"))
    (tmp_path / "tree" / "in").rename(tmp_path / "tree" / "renamed")
    await watched.until(("moved_from", "in/"), ("moved_to", "renamed/"), ("created", "renamed/deep/there"))
    (tmp_path / "tree" / "renamed" / "deep" / "new").touch()
    assert ("created", "in/deep/new") not in await watched.until(("created", "renamed/deep/new"))
    (tmp_path / "tree" / "renamed").rename(tmp_path / "outside")
    await watched.until(("moved_from", "renamed/"))
    (tmp_path / "outside" / "deep" / "unseen").touch()
    (tmp_path / "tree" / "last").touch()
    assert not any("unseen" in path for _, path in await watched.until(("created", "last")))
    await watched.events.aclose()


async def test_links_are_not_followed_by_a_watch(session: Session, tmp_path: Path) -> None:
    """A link below the watched directory leads nowhere else, and a loop of links ends."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "tree" / "link").symlink_to("../outside")
    (tmp_path / "tree" / "loop").symlink_to(".")
    watched = await watch(session, tmp_path / "tree", recursive=True)
    (tmp_path / "outside" / "unseen").touch()
    (tmp_path / "tree" / "last").touch()
    assert await watched.next() == ("created", "last")
    await watched.events.aclose()


async def test_dropped_events_are_reported(session: Session, tmp_path: Path) -> None:
    """If the client does not read, the kernel drops events, and the client is told. Directories that
    appeared meanwhile are watched then.
    """
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    (tmp_path / "file").touch()
    watched = await watch(session, tmp_path, recursive=True)

    def change() -> None:
        for _ in range((limit + 30_000) // 2):  # more than all buffers on the way hold
            os.utime(tmp_path / "file")
            os.utime(tmp_path)  # two of the same in a row would be one

    await asyncio.to_thread(change)
    (tmp_path / "new").mkdir()
    await watched.until(("overflow", "."))
    (tmp_path / "new" / "file").touch()
    await watched.until(("created", "new/file"))
    await watched.events.aclose()


async def test_a_path_that_cannot_be_watched(session: Session, tmp_path: Path) -> None:
    """The guest's errno arrives."""
    assert await refused(anext(session.watching(str(tmp_path / "missing")))) == errno.ENOENT


def deepen(directory: Path, levels: int) -> None:
    """Make directories with long names below each other, by relative paths: no whole path is that long."""
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d" * 240, dir_fd=fd)
        inner = os.open("d" * 240, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


async def test_a_tree_with_longer_paths_is_not_watched(session: Session, tmp_path: Path) -> None:
    """A directory whose path is longer than the kernel's limit cannot be watched: the watch fails instead of
    missing its changes, also if the directory appears later.
    """
    (tmp_path / "deep").mkdir()
    deepen(tmp_path / "deep", 15)
    watched = await watch(session, tmp_path / "deep", recursive=True)
    (bottom := tmp_path.joinpath("deep", *["d" * 240] * 15) / "file").touch()
    await watched.until(("created", str(bottom.relative_to(tmp_path / "deep"))))
    await watched.events.aclose()
    (tmp_path / "deeper").mkdir()
    watched = await watch(session, tmp_path / "deeper", recursive=True)
    (tmp_path / "later").mkdir()
    deepen(tmp_path / "later", 20)
    (tmp_path / "later").rename(tmp_path / "deeper" / "later")

    async def read() -> None:
        async with asyncio.timeout(DEADLINE_S):
            async for _ in watched.events:
                pass

    assert await refused(read()) == errno.ENAMETOOLONG
    with pytest.raises(GuestRefused, match="longer than can be watched") as caught:
        await watch(session, tmp_path / "deeper", recursive=True)
    assert caught.value.errno == errno.ENAMETOOLONG
    shutil.rmtree(tmp_path / "deeper")  # by descriptors: pytest could not remove it


async def test_a_watch_ends_with_its_host(tmp_path: Path) -> None:
    """A watch that nobody reads any more leaves no process in the guest."""
    async with running_agent() as agent:
        channel = await Channel.over(agent.sock, DEADLINE_S)
        stream = await channel.open(FrameType.FILE_WATCH, encode_fields([(1, str(tmp_path))]))
        await stream.receive()
        await channel.close()
    # `running_agent` waits for the agent, which waits for its processes


# ---- hostile answers ----

RECORDS = {
    "no name": b"\1" + (payload := encode_fields([(1, "f")])).__len__().to_bytes(4, "little") + payload,
    "a record too long": b"\1\xff\xff\xff\xff",
    "no end": b"",
}


@pytest.mark.parametrize("case", list(RECORDS))
async def test_a_hostile_list_is_an_error(case: str) -> None:
    """Malformed records are errors of the protocol."""

    async def answer(peer: Peer, frame: Frame) -> None:
        number = frame.stream
        if RECORDS[case]:
            await peer.send(FrameType.DATA, number, RECORDS[case])
        await peer.send(FrameType.OK, number)

    async with talking_to(answer, DEADLINE_S) as channel:
        with pytest.raises(GuestProtocolError):
            [each async for each in Session(channel).listing("/x")]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b"])
async def test_entries_have_single_names(name: bytes) -> None:
    """An entry of a hostile guest cannot be a path outside the directory."""
    payload = encode_fields([(8, name), (1, "f"), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0)])

    async def answer(peer: Peer, frame: Frame) -> None:
        number = frame.stream
        await peer.send(FrameType.DATA, number, b"\1" + len(payload).to_bytes(4, "little") + payload)
        await peer.send(FrameType.OK, number)

    async with talking_to(answer, DEADLINE_S) as channel:
        with pytest.raises(GuestProtocolError):
            [each async for each in Session(channel).listing("/x")]


@pytest.mark.parametrize(
    "fields", [[(11, 0x100), (8, "../x")], [(11, 0x100), (8, "/x")], [(11, 3), (8, "x")], [(8, "x")]]
)
async def test_hostile_events_are_errors(fields: list[tuple[int, int | str]]) -> None:
    """An event has a known kind, and a path below the watched one."""
    payload = encode_fields(fields)

    async def answer(peer: Peer, frame: Frame) -> None:
        number = frame.stream
        await peer.send(FrameType.DATA, number, b"\5" + len(payload).to_bytes(4, "little") + payload)

    async with talking_to(answer, DEADLINE_S) as channel:
        with pytest.raises(GuestProtocolError):
            [each async for each in Session(channel).watching("/x")]
