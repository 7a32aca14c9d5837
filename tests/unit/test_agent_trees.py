"""Trees through the real agent: an unpacked tree equals the packed one, and no member leaves its
directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_process import BUILDS, agent_session, names
from agent_requests import tree_into_new
from coppice.agent import records
from coppice.agent.records import Content, End, Entry, Item
from coppice.agent.session import Session
from coppice.errors import GuestProtocolError, GuestRefused
from guest_trees import describe, entry, file, plant, tree

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can set owners and make devices")


@pytest.fixture(params=BUILDS)
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    async with agent_session(request.param) as session:
        yield session


async def collected(stream: AsyncIterator[bytes]) -> bytes:
    """Return all bytes of a stream."""
    return b"".join([chunk async for chunk in stream])


async def test_a_tree_comes_back_unchanged(session: Session, tmp_path: Path) -> None:
    """A tree that the agent packs and unpacks keeps its names, modes, owners, times, links and
    pipes.
    """
    plant(tmp_path / "tree")
    packed = await collected(session.tree_out(str(tmp_path / "tree")))
    (tmp_path / "copy").mkdir()
    result = await session.tree_in(str(tmp_path / "copy"), packed)
    assert describe(tmp_path / "copy" / "tree") == describe(tmp_path / "tree")
    assert result.members == len(describe(tmp_path / "tree")) + 1


ESCAPES: dict[str, list[Item]] = {
    "parent": file("../escaped", b"x"),
    "parent inside": file("a/../../escaped", b"x"),
    "link then file": [entry("out", "l", link=".."), *file("out/escaped", b"x")],
    "absolute link": [entry("out", "l", link="{outside}"), *file("out/escaped", b"x")],
    "absolute name": file("{outside}/escaped", b"x"),
    "hard link": [entry("hard", "h", link="../secret")],
    "hard link by link": [entry("out", "l", link=".."), entry("hard", "h", link="out/secret")],
    "write through a link": [entry("file", "l", link="../secret"), *file("file", b"overwritten")],
    "directory over a link": [entry("sub", "l", link="../other"), entry("sub", "d", mode=0o777)],
}


@pytest.mark.parametrize("name", list(ESCAPES))
async def test_entries_never_leave_the_directory(session: Session, tmp_path: Path, name: str) -> None:
    """Nothing outside the directory is made, changed or linked to, whatever the paths and links of a
    tree say.
    """
    outside, inside = tmp_path, tmp_path / "in"
    inside.mkdir()
    (outside / "other").mkdir(mode=0o700)
    (outside / "secret").write_bytes(b"secret")
    items = [
        item._replace(path=item.path.format(outside=outside), link=item.link.format(outside=outside))
        if isinstance(item, Entry)
        else item
        for item in ESCAPES[name]
    ]
    with contextlib.suppress(GuestRefused):  # refused, or resolved as if the directory were the root
        await session.tree_in(str(inside), tree(*items))
    assert names(outside) == ["in", "other", "secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert (outside / "secret").stat().st_nlink == 1
    assert stat.S_IMODE((outside / "other").stat().st_mode) == 0o700


async def test_a_linked_directory_stays_a_link(session: Session, tmp_path: Path) -> None:
    """A link like /lib -> usr/lib survives a tree with a directory of that name; the entries go
    through the link.
    """
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    await session.tree_in(str(tmp_path), tree(entry("lib", "d", mode=0o755), *file("lib/x", b"x")))
    assert (tmp_path / "lib").is_symlink()
    assert (tmp_path / "usr/lib/x").read_bytes() == b"x"


async def test_a_truncated_tree_is_refused(session: Session, tmp_path: Path) -> None:
    """A tree without its end is an error, wherever it was cut."""
    content = file("file", b"x" * 50)
    whole = tree(*content)
    for size in range(len(whole)):
        with pytest.raises(GuestRefused) as caught:
            await session.tree_in(str(tmp_path), whole[:size])
        assert caught.value.errno == errno.EINVAL
        # A part of a file does not pass for the file. Each record before the end of the tree has 5 bytes at least.
        assert names(tmp_path) == (["file"] if size >= len(whole) - 5 else [])


MALFORMED: dict[str, list[Item]] = {
    "content before an entry": [Content(0, b"x")],
    "an end before an entry": [End(0)],
    "content of a directory": [entry("d", "d"), Content(0, b"x"), End(1)],
    "content that goes back": [entry("f"), Content(5, b"x"), Content(3, b"y"), End(9)],
    "content over itself": [entry("f"), Content(0, b"xx"), Content(1, b"y"), End(9)],
    "content beyond all files": [entry("f"), Content((1 << 63) - 2, b"xxxx"), End((1 << 63) - 1)],
    "an end before the content": [entry("f"), Content(0, b"xx"), End(1)],
    "a file without its end": [entry("f"), Content(0, b"xx"), entry("g"), End(0)],
    "a file that the tree's end cuts off": [entry("f"), Content(0, b"xx")],
    "a record too long": [entry("f"), Content(0, bytes(70_000)), End(70_000)],
    "two ends": [*file("f", b"x"), End(1)],
}


@pytest.mark.parametrize("case", list(MALFORMED))
async def test_a_malformed_tree_is_refused(session: Session, tmp_path: Path, case: str) -> None:
    """Records in the wrong place are refused by both readers, before anything that follows them."""
    packed = tree(*MALFORMED[case], *file("next", b"next"))
    with pytest.raises(GuestRefused) as caught:
        await session.tree_in(str(tmp_path), packed)
    assert caught.value.errno == errno.EINVAL
    assert names(tmp_path) in ([], ["d"]) or case == "two ends"
    with pytest.raises(GuestProtocolError):
        list(records.read(io.BytesIO(packed)))


async def test_a_socket_is_no_entry(session: Session, tmp_path: Path) -> None:
    """A kind that cannot be made is refused, and what it would replace stays."""
    (tmp_path / "there").write_bytes(b"x")
    with pytest.raises(GuestRefused) as caught:
        await session.tree_in(str(tmp_path), tree(entry("there", "s")))  # type: ignore[arg-type]
    assert caught.value.errno == errno.EOPNOTSUPP
    assert (tmp_path / "there").read_bytes() == b"x"


async def test_a_file_that_shrinks_fails_the_copy(session: Session, tmp_path: Path) -> None:
    """A file that becomes shorter while it is sent is an error, not padded with zeros."""
    for name, holes in (("data", False), ("sparse", True)):
        path = tmp_path / name
        with path.open("wb") as writing:
            writing.write(os.urandom(4 << 20))
            writing.truncate(64 << 20 if holes else 4 << 20)
        sending = session.tree_out(str(path))
        received = len(await anext(sending))  # the rest waits for the window
        os.truncate(path, 3 << 20)
        with pytest.raises(GuestRefused, match="shorter"):
            received += len(await collected(sending))
        assert received < 4 << 20


async def test_a_file_without_a_size_is_read_to_its_end(session: Session, tmp_path: Path) -> None:
    """Files of /proc and /sys claim other sizes than they have, and are sent as they read."""
    for path in (Path("/proc/1/mounts"), Path("/sys/kernel/uevent_seqnum"), Path("/proc/version")):
        first, *rest = records.read(io.BytesIO(await collected(session.tree_out(str(path)))))
        content = b"".join(item.data for item in rest if isinstance(item, Content))
        assert first == entry(path.name, mode=stat.S_IMODE(path.stat().st_mode))._replace(
            uid=0, gid=0, mtime_ns=first.mtime_ns if isinstance(first, Entry) else 0
        )
        assert rest[-1] == End(len(content))
        assert content
        if path.name == "version":
            assert content == path.read_bytes()


async def test_bytes_that_are_not_a_tree_are_refused(session: Session, tmp_path: Path) -> None:
    """Bytes that are not a tree are refused at once, however many follow."""
    noise = b"\7" + os.urandom(1 << 20)
    with pytest.raises(GuestRefused) as caught:
        await session.tree_in(str(tmp_path), noise)
    assert caught.value.errno == errno.EINVAL
    assert names(tmp_path) == []


async def test_a_missing_directory_is_made_only_when_asked(session: Session, tmp_path: Path) -> None:
    """A client may ask for a new directory; otherwise the archive is refused."""
    packed = tree(*file("file", b"x"))
    with pytest.raises(GuestRefused):
        await session.tree_in(str(tmp_path / "new"), packed)
    await tree_into_new(session, str(tmp_path / "new"), packed)
    assert (tmp_path / "new" / "file").read_bytes() == b"x"


async def test_a_tree_deeper_than_the_bound_is_an_error(session: Session, tmp_path: Path) -> None:
    """The walk's memory is bounded: an endless tree is refused."""
    (tmp_path / "/".join(["d"] * 200)).mkdir(parents=True)
    with pytest.raises(GuestRefused) as caught:
        await collected(session.tree_out(str(tmp_path)))
    assert caught.value.errno == errno.ELOOP


async def test_a_large_tree_with_many_files(session: Session, tmp_path: Path) -> None:
    """Thousands of members go in both directions, in the directory's order and with real window
    updates.
    """
    for n in range(2000):
        (tmp_path / "tree" / str(n % 40)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / str(n % 40) / str(n)).write_bytes(b"%d" % n * (n % 50))
    packed = await collected(session.tree_out(str(tmp_path / "tree"), contents=True))
    (tmp_path / "copy").mkdir()
    await session.tree_in(str(tmp_path / "copy"), packed)
    assert describe(tmp_path / "copy") == describe(tmp_path / "tree")


@pytest.mark.parametrize("field", ["uid", "gid"])
@pytest.mark.parametrize("number", [-1, (1 << 32) - 1, (1 << 32) + 4242])
async def test_an_owner_that_no_file_can_have_is_refused(
    session: Session, tmp_path: Path, field: str, number: int
) -> None:
    """A number that is too large is refused: truncated, it would be another user's."""
    with pytest.raises(GuestRefused) as caught:
        await session.tree_in(str(tmp_path), tree(*file("file", b"contents", **{field: number & ((1 << 64) - 1)})))
    assert caught.value.errno == errno.EINVAL
    assert names(tmp_path) == []


async def test_every_directory_keeps_its_time(session: Session, tmp_path: Path) -> None:
    """Directories keep their times, however many there are, although files are put into them later."""
    directories = [entry(f"{n}", "d", mtime_ns=(1_000_000 + n) * 10**9, mode=0o755) for n in range(17_000)]
    files = [item for n in range(17_000) for item in file(f"{n}/file", b"contents")]
    await session.tree_in(str(tmp_path), tree(*directories, *files))
    times = {int(path.name): int(path.stat().st_mtime) for path in tmp_path.iterdir()}
    assert times == {n: 1_000_000 + n for n in range(17_000)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), max_size=6),
    size=st.integers(0, 1200),
)
def test_a_damaged_tree_never_harms_the_agent(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], size: int
) -> None:
    """Any bytes give entries or an error, never a crash (the sanitizers watch) or a file outside the
    directory.
    """
    outside = tmp_path_factory.mktemp("damaged")
    (outside / "in").mkdir()
    data = bytearray(
        tree(
            entry("dir", "d"),
            *file("n" * 120, b"contents"),
            entry("sparse"),
            Content(9, b"sparse"),
            Content(90_000, b"data"),
            End(700_000),
            entry("l", "l", link="dir", mtime_ns=-1),
            entry("hard", "h", link="sparse"),
        )
    )
    for at, value in edits:
        if at < len(data):
            data[at] = value

    async def unpack() -> None:
        async with agent_session("sanitized") as session:
            with contextlib.suppress(GuestRefused):
                await session.tree_in(str(outside / "in"), bytes(data[: size or len(data)]))
            assert (await session.stat("/")).kind == "d"

    asyncio.run(unpack())
    assert names(outside) == ["in"]
