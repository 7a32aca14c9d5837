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
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_process import BUILDS, agent_session, names
from coppice.agent.session import Session
from coppice.agent.unpack import unpack
from coppice.errors import GuestProtocolError, GuestRefused

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


async def collected(stream: AsyncIterator[bytes]) -> bytes:
    """Return all bytes of a stream."""
    return b"".join([chunk async for chunk in stream])


def plant(root: Path) -> None:
    """Make a tree with every kind of member."""
    long = root / ("d" * 200) / ("e" * 200)
    long.mkdir(parents=True)
    (long / "file").write_bytes(b"deep")
    (root / "empty").mkdir(mode=0o700)
    (root / "binary").write_bytes(os.urandom(200_000))
    (root / "binary").chmod(0o4711)
    (root / "name ü\n").write_bytes(b"odd")
    os.link(root / "binary", root / "hard")
    (root / "soft").symlink_to("binary")
    (root / "dangling").symlink_to("/nowhere/" + "x" * 150)
    os.mkfifo(root / "pipe", 0o600)
    os.utime(root / "binary", (1_000_000_000, 1_000_000_000))
    os.utime(root / "empty", (1_100_000_000, 1_100_000_000))


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Return the tree's properties, for comparison."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        contents: object = None
        if path.is_symlink():
            contents = str(path.readlink())
        elif path.is_file():
            contents = path.read_bytes()
        mtime = 0 if path.is_symlink() else int(status.st_mtime)
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_nlink, mtime, contents)
    return found


async def test_a_tree_comes_back_unchanged(session: Session, tmp_path: Path) -> None:
    """A tree that the agent packs and unpacks keeps its names, modes, owners, times, links and
    pipes.
    """
    plant(tmp_path / "tree")
    packed = await collected(session.tar_out(str(tmp_path / "tree")))
    (tmp_path / "copy").mkdir()
    result = await session.tar_in(str(tmp_path / "copy"), packed)
    assert describe(tmp_path / "copy" / "tree") == describe(tmp_path / "tree")
    assert result.members == len(describe(tmp_path / "tree")) + 1


async def test_other_tools_can_read_the_archive(session: Session, tmp_path: Path) -> None:
    """Python's tarfile finds the same members."""
    plant(tmp_path / "tree")
    packed = await collected(session.tar_out(str(tmp_path / "tree"), contents=True))
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
    await session.tar_in(str(tmp_path), archive(*members, format_=format_))
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
    await session.tar_in(str(tmp_path), archive((info, b""), (member("file", uid=3_000_000, gid=7), b"x")))
    status = (tmp_path / "file").stat()
    assert (status.st_uid, status.st_gid) == (3_000_000, 7)
    device = (tmp_path / "zero").stat()
    assert (device.st_rdev, stat.S_IMODE(device.st_mode)) == (os.makedev(1, 5), 0o620)
    packed = await collected(session.tar_out(str(tmp_path), contents=True))
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert tar.getmember("file").uid == 3_000_000
        assert tar.getmember("zero").devminor == 5


ESCAPES = {
    "parent": [(member("../escaped"), b"x")],
    "parent inside": [(member("a/../../escaped"), b"x")],
    "link then file": [(member("out", tarfile.SYMTYPE, linkname=".."), b""), (member("out/escaped"), b"x")],
    "absolute link": [(member("out", tarfile.SYMTYPE, linkname="{outside}"), b""), (member("out/escaped"), b"x")],
    "absolute name": [(member("{outside}/escaped"), b"x")],
    "hard link": [(member("hard", tarfile.LNKTYPE, linkname="../secret"), b"")],
    "hard link by link": [
        (member("out", tarfile.SYMTYPE, linkname=".."), b""),
        (member("hard", tarfile.LNKTYPE, linkname="out/secret"), b""),
    ],
    "write through a link": [
        (member("file", tarfile.SYMTYPE, linkname="../secret"), b""),
        (member("file"), b"overwritten"),
    ],
    "directory over a link": [
        (member("sub", tarfile.SYMTYPE, linkname="../other"), b""),
        (member("sub", tarfile.DIRTYPE, mode=0o777), b""),
    ],
}


@pytest.mark.parametrize("name", list(ESCAPES))
async def test_members_never_leave_the_directory(session: Session, tmp_path: Path, name: str) -> None:
    """Nothing outside the directory is made, changed or linked to, whatever the names and links of
    an archive say.
    """
    outside, inside = tmp_path, tmp_path / "in"
    inside.mkdir()
    (outside / "other").mkdir(mode=0o700)
    (outside / "secret").write_bytes(b"secret")
    members = []
    for info, data in ESCAPES[name]:
        copy = member(info.name.format(outside=outside), info.type, mode=info.mode)
        copy.linkname = info.linkname.format(outside=outside)
        members.append((copy, data))
    with contextlib.suppress(GuestRefused):  # refused, or resolved as if the directory were the root
        await session.tar_in(str(inside), archive(*members))
    assert names(outside) == ["in", "other", "secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert (outside / "secret").stat().st_nlink == 1
    assert stat.S_IMODE((outside / "other").stat().st_mode) == 0o700


async def test_a_linked_directory_stays_a_link(session: Session, tmp_path: Path) -> None:
    """A link like /lib -> usr/lib survives an archive with a directory of that name; the members go
    through the link.
    """
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    await session.tar_in(
        str(tmp_path), archive((member("lib", tarfile.DIRTYPE, mode=0o755), b""), (member("lib/x"), b"x"))
    )
    assert (tmp_path / "lib").is_symlink()
    assert (tmp_path / "usr/lib/x").read_bytes() == b"x"


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
    "too many": ("0,0," * 1024 + "0,5", False),
}


@pytest.mark.parametrize("case", list(MAPS))
async def test_only_a_valid_map_of_holes_is_followed(session: Session, tmp_path: Path, case: str) -> None:
    """A map of holes in order is followed. Both readers refuse any other map, and do not apply it
    to the next file.
    """
    text, valid = MAPS[case]
    headers = {"GNU.sparse.size": "100000", "GNU.sparse.map": text}
    members = ((member("file", pax_headers=headers), b"abcde"), (member("next"), b"next"))
    if valid:
        offsets = [int(number) for number in text.split(",")]
        expected, data = bytearray(100_000), iter(b"abcde")
        for offset, length in zip(offsets[::2], offsets[1::2], strict=True):
            expected[offset : offset + length] = bytes(next(data) for _ in range(length))
        result = await session.tar_in(str(tmp_path), archive(*members))
        assert (tmp_path / "file").read_bytes() == expected
        assert (tmp_path / "next").read_bytes() == b"next"
        assert result.content_bytes == 100_004
        assert unpack(io.BytesIO(archive(members[0])), tmp_path, "unpacked") == 100_000
        assert (tmp_path / "unpacked").read_bytes() == expected
        return
    with pytest.raises(GuestRefused):
        await session.tar_in(str(tmp_path), archive(*members))
    with pytest.raises(GuestProtocolError):
        unpack(io.BytesIO(archive(members[0])), tmp_path, "unpacked")
    assert not {"file", "next", "unpacked"} & set(names(tmp_path))


async def test_a_map_of_holes_applies_to_one_member(session: Session, tmp_path: Path) -> None:
    """A link's map of holes does not apply to the file that follows."""
    headers = {"GNU.sparse.size": "100000", "GNU.sparse.map": "99996,4"}
    link = member("link", tarfile.SYMTYPE, linkname="x", pax_headers=headers)
    await session.tar_in(str(tmp_path), archive((link, b""), (member("next"), b"next")))
    assert (tmp_path / "next").read_bytes() == b"next"


async def test_a_truncated_archive_is_refused(session: Session, tmp_path: Path) -> None:
    """An archive without its end is an error, wherever it was cut."""
    whole = archive((member("file"), b"x" * 5000))
    for size in (0, 100, 512, 700, 5000, 512 + 5120):
        with pytest.raises(GuestRefused):
            await session.tar_in(str(tmp_path), whole[:size])


async def test_bytes_that_are_not_an_archive_are_refused(session: Session, tmp_path: Path) -> None:
    """Bytes that are not an archive are refused at once, however many follow."""
    with pytest.raises(GuestRefused) as caught:
        await session.tar_in(str(tmp_path), os.urandom(1 << 20))
    assert caught.value.errno == errno.EINVAL
    assert names(tmp_path) == []


async def test_a_missing_directory_is_made_only_when_asked(session: Session, tmp_path: Path) -> None:
    """`make` makes the directory; without it the archive is refused."""
    packed = archive((member("file"), b"x"))
    with pytest.raises(GuestRefused):
        await session.tar_in(str(tmp_path / "new"), packed)
    await session.tar_in(str(tmp_path / "new"), packed, make=True)
    assert (tmp_path / "new" / "file").read_bytes() == b"x"


async def test_a_tree_deeper_than_the_bound_is_an_error(session: Session, tmp_path: Path) -> None:
    """The walk's memory is bounded: an endless tree is refused."""
    (tmp_path / "/".join(["d"] * 200)).mkdir(parents=True)
    with pytest.raises(GuestRefused) as caught:
        await collected(session.tar_out(str(tmp_path)))
    assert caught.value.errno == errno.ELOOP


async def test_a_large_tree_with_many_files(session: Session, tmp_path: Path) -> None:
    """Thousands of members go in both directions, in the directory's order and with real window
    updates.
    """
    for n in range(2000):
        (tmp_path / "tree" / str(n % 40)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / str(n % 40) / str(n)).write_bytes(b"%d" % n * (n % 50))
    packed = await collected(session.tar_out(str(tmp_path / "tree"), contents=True))
    await session.tar_in(str(tmp_path / "copy"), packed, make=True)
    assert describe(tmp_path / "copy") == describe(tmp_path / "tree")


@pytest.mark.parametrize("field", ["uid", "gid"])
@pytest.mark.parametrize("number", [-1, (1 << 32) - 1, (1 << 32) + 4242])
async def test_an_owner_that_no_file_can_have_is_refused(
    session: Session, tmp_path: Path, field: str, number: int
) -> None:
    """A number that is too large is refused: truncated, it would be another user's."""
    with pytest.raises(GuestRefused) as caught:
        await session.tar_in(str(tmp_path), archive((member("file", tarfile.REGTYPE, **{field: number}), b"contents")))
    assert caught.value.errno == errno.EINVAL
    assert names(tmp_path) == []


async def test_every_directory_keeps_its_time(session: Session, tmp_path: Path) -> None:
    """Directories keep their times, however many there are, although files are put into them later."""
    members = [(member(f"{n}", tarfile.DIRTYPE, mtime=1_000_000 + n, mode=0o755), b"") for n in range(17_000)]
    files = [(member(f"{n}/file"), b"contents") for n in range(17_000)]
    await session.tar_in(str(tmp_path), archive(*members, *files))
    times = {int(path.name): int(path.stat().st_mtime) for path in tmp_path.iterdir()}
    assert times == {n: 1_000_000 + n for n in range(17_000)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 6143), st.integers(0, 255)), max_size=6),
    fix=st.booleans(),
    size=st.integers(0, 8000),
)
def test_a_damaged_archive_never_harms_the_agent(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], fix: bool, size: int
) -> None:
    """Any bytes in a header give members or an error, never a crash (the sanitizers watch) or a
    file outside the directory.
    """
    outside = tmp_path_factory.mktemp("damaged")
    (outside / "in").mkdir()
    name = "n" * 120
    data = bytearray(
        archive(
            (member("dir", tarfile.DIRTYPE), b""),
            (member(name), b"contents"),
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

    async def unpack() -> None:
        async with agent_session("sanitized") as session:
            with contextlib.suppress(GuestRefused):
                await session.tar_in(str(outside / "in"), bytes(data[: size or len(data)]))
            assert (await session.stat("/")).kind == "d"

    asyncio.run(unpack())
    assert names(outside) == ["in"]
