"""Volumes made from an archive: the file system has the archive's contents, and the archive affects
nothing else.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coppice.errors import ImageError, UnsafePath, UsageError
from coppice.images.tree import Bytes, FileTree, Node
from coppice.model import MIB, Progress, no_progress
from coppice.stopping import WorkStopped, run
from coppice.volumes.content import volume_from_archive, write_ext4
from coppice.volumes.ext4 import fsck
from image_archives import Member, directory, file, hardlink, other, set_flag, symlink, tar, workspace

SIZE = 16 * MIB
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can extract files with their owners")


def fill(tmp_path: Path, archive: bytes) -> Path:
    """Make the disk of a volume from this archive, in a separate directory."""
    (tmp_path / "archive.tar").write_bytes(archive)
    (tmp_path / "volume").mkdir()
    disk = tmp_path / "volume" / "data.raw"
    volume_from_archive(tmp_path / "archive.tar", disk, SIZE, progress=no_progress)
    return disk


def debugfs(disk: Path, command: str) -> str:
    """Return the output of e2fsprogs' debugger."""
    done = subprocess.run(["/usr/sbin/debugfs", "-R", command, str(disk)], capture_output=True, check=True, timeout=30)
    return done.stdout.decode("utf-8", "backslashreplace")


def inode(disk: Path, path: str) -> dict[str, str]:
    """Return some fields of the inode at a path."""
    shown = debugfs(disk, f"stat {path}")
    return {name: found[1] for name in ("Type", "Mode", "User", "Group", "Links", "mtime") if (found := re.search(rf"{name}: +(\S+)", shown))}  # fmt: skip


def with_fields(member: Member, **fields: object) -> Member:
    """Return the member with changed header fields."""
    for name, value in fields.items():
        setattr(member[0], name, value)
    return member


def test_the_volume_has_all_properties_of_the_archive(tmp_path: Path) -> None:
    """Owners and times beyond 32 bits, modes that deny all access, set-id bits, both kinds of
    links, pipes, attributes and the root itself are kept.
    """
    xattrs = {"SCHILY.xattr.user.note": 'two\nlines "and" a zero\0', "SCHILY.xattr.security.capability": "cap"}
    disk = fill(
        tmp_path,
        tar(
            with_fields(directory("./", 0o1777), uid=5, gid=6, mtime=1_111_111_111),
            with_fields(directory("closed", 0), uid=70_000, gid=3_000_000_000, mtime=4_000_000_000),
            with_fields(
                file("closed/file", b"x" * 100_000, mode=0o6711, uid=1000, mtime=9_000_000_000), pax_headers=xattrs
            ),
            hardlink("closed/hard", "closed/file"),
            with_fields(symlink("soft", "closed/file"), uid=7, mtime=1_000_000_000.5),
            symlink("long", "d" * 200),
            other(tarfile.FIFOTYPE, "pipe", mode=0o620),
            directory("lost+found", 0o700),
        ),
    )
    assert fsck(disk).clean
    assert [path.name for path in disk.parent.iterdir()] == ["data.raw"]
    assert (disk.stat().st_size, stat.S_IMODE(disk.stat().st_mode)) == (SIZE, 0o600)
    assert inode(disk, "/") | {"Links": ""} == {
        "Type": "directory", "Mode": "01777", "User": "5", "Group": "6", "Links": "", "mtime": "0x423a35c7:00000000",
    }  # fmt: skip
    closed = inode(disk, "closed")
    assert (closed["Mode"], closed["User"], int(closed["Group"]) % (1 << 32)) == ("0000", "70000", 3_000_000_000)
    assert closed["mtime"] == f"{4_000_000_000:#010x}:00000001"
    found = inode(disk, "closed/file")
    assert found == inode(disk, "closed/hard")
    assert (found["Mode"], found["User"], found["Links"]) == ("06711", "1000", "2")
    assert found["mtime"] == f"{9_000_000_000 % (1 << 32):#010x}:00000002"
    assert debugfs(disk, "cat closed/file") == "x" * 100_000
    assert debugfs(disk, "ea_get -x closed/file user.note").split("= ")[1].strip() == (
        b'two\nlines "and" a zero\0'.hex(" ")
    )
    assert "security.capability (3)" in debugfs(disk, "ea_list closed/file")
    assert (inode(disk, "soft")["Type"], inode(disk, "soft")["User"]) == ("symlink", "7")
    assert inode(disk, "soft")["mtime"] == f"{1_000_000_000:#010x}:{500_000_000 << 2:08x}"
    assert 'Fast link dest: "closed/file"' in debugfs(disk, "stat soft")
    assert inode(disk, "long")["Type"] == "symlink"
    assert (inode(disk, "pipe")["Type"], inode(disk, "pipe")["Mode"]) == ("FIFO", "0620")


def test_names_are_never_commands(tmp_path: Path) -> None:
    """Words, quotes and newlines that a tool's script would interpret are part of the name."""
    names = ['a"b', "two words", "line\nsif <2> uid 99\nrm kept", "-d", "\x1b[2J", "kept"]
    disk = fill(tmp_path, tar(*(file(name, name.encode()) for name in names)))
    assert fsck(disk).clean
    assert inode(disk, "/")["User"] == "0"
    listed = debugfs(disk, "ls -p /").count("/100644/")
    assert listed == len(names)


REFUSED: dict[str, tuple[list[Member], type[Exception]]] = {
    "parent": ([file("../escaped")], UnsafePath),
    "parent inside": ([file("a/../../escaped")], UnsafePath),
    "hard link out": ([hardlink("hard", "../outside")], UnsafePath),
    "hard link to nothing": ([hardlink("hard", "outside")], ImageError),
    "device": ([other(tarfile.CHRTYPE, "null", device=(1, 3))], ImageError),
    "too deep": ([file("/".join(["d"] * 200))], ImageError),
    "attribute": ([with_fields(file("x"), pax_headers={"SCHILY.xattr.user.a b\nrm /": "x"})], ImageError),
    "attribute that is too large": ([with_fields(file("x"), pax_headers={"SCHILY.xattr.user.a": "x" * 9000})], Exception),
    "lost+found is a file": ([file("lost+found")], Exception),
    "does not fit": ([file("large", os.urandom(SIZE))], UsageError),
    "too many": ([file(str(number)) for number in range(1100)], UsageError),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_content_that_a_volume_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    """The error gives the reason, and nothing is left in the volume's directory or made elsewhere."""
    (tmp_path / "outside").write_bytes(b"secret")
    members, error = REFUSED[case]
    with pytest.raises(error):
        fill(tmp_path, tar(*members))
    assert list((tmp_path / "volume").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.tar", "outside", "volume"]
    assert (tmp_path / "outside").stat().st_nlink == 1


def test_links_are_followed_inside_the_volume(tmp_path: Path) -> None:
    """A member below a link is made at the link's target inside the volume, never on the host."""
    secret = tmp_path / "secret"
    secret.mkdir()
    disk = fill(tmp_path, tar(symlink("out", str(secret)), file("out/file", b"inside"), symlink("up", "../../secret")))
    assert fsck(disk).clean
    assert list(secret.iterdir()) == []
    assert debugfs(disk, f"cat {secret}/file") == "inside"


@pytest.mark.parametrize("size", [0, 700, 5000])
def test_a_damaged_archive_is_refused(tmp_path: Path, size: int) -> None:
    """A truncated archive leaves nothing, wherever it was cut."""
    with pytest.raises(ImageError):
        fill(tmp_path, tar(file("file", b"x" * 9000))[:size])
    assert list((tmp_path / "volume").iterdir()) == []


def test_a_cancelled_copy_leaves_nothing(tmp_path: Path) -> None:
    """A cancelled copy ends early and leaves nothing."""
    with pytest.raises(WorkStopped):
        run(set_flag(), fill, tmp_path, tar(file("file", b"x" * 9000)))
    assert list((tmp_path / "volume").iterdir()) == []


def test_zeros_become_holes_and_progress_is_reported(tmp_path: Path) -> None:
    """Long runs of zeros take no space, and the copy reports its progress."""
    (tmp_path / "archive.tar").write_bytes(tar(file("sparse", bytes(32 * MIB) + b"end")))
    (tmp_path / "volume").mkdir()
    disk, steps = tmp_path / "volume" / "data.raw", list[Progress]()
    volume_from_archive(tmp_path / "archive.tar", disk, SIZE, progress=steps.append)
    assert disk.stat().st_blocks * 512 < 4 * MIB
    assert steps[-1] == Progress(stage="copy", done=32 * MIB + 3, total=32 * MIB + 3, unit="bytes")


names = st.binary(min_size=1, max_size=40).filter(lambda name: not set(name) & {0, 47} and name not in (b".", b".."))
owned = st.tuples(st.integers(0, (1 << 32) - 2), st.integers(0, (1 << 32) - 2), st.integers(0, 1 << 31))
nodes = st.recursive(
    st.one_of(
        st.builds(lambda data, mode, own: ("file", data, mode, own), st.binary(max_size=9000), st.integers(0, 0o7777), owned),
        st.builds(lambda target, own: ("link", target, 0o777, own), st.binary(min_size=1, max_size=80).filter(lambda t: 0 not in t), owned),
    ),
    lambda inner: st.builds(
        lambda children, mode, own: ("dir", children, mode, own),
        st.dictionaries(names, inner, max_size=6), st.integers(0, 0o7777), owned,
    ),
    max_leaves=20,
)  # fmt: skip


def node(made: tuple[str, object, int, tuple[int, int, int]]) -> Node:
    """Return the node for a drawn value."""
    kind, value, mode, (uid, gid, mtime) = made
    made_of = Node(mode, uid, gid, mtime * 10**9)
    if kind == "dir":
        assert isinstance(value, dict)
        made_of.mode |= stat.S_IFDIR
        made_of.children = {name: node(below) for name, below in value.items()}
        return made_of
    assert isinstance(value, bytes)
    made_of.mode |= stat.S_IFLNK if kind == "link" else stat.S_IFREG
    if kind == "link":
        made_of.target = value
    else:
        made_of.content = Bytes(value)
    return made_of


@as_root
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(children=st.dictionaries(names.filter(lambda name: name != b"lost+found"), nodes, max_size=6))
def test_any_tree_is_extracted_unchanged(
    tmp_path_factory: pytest.TempPathFactory, children: dict[bytes, tuple[str, object, int, tuple[int, int, int]]]
) -> None:
    """The file system is sound, and e2fsprogs extracts the same names, owners, modes, times,
    targets and contents.
    """
    directory = tmp_path_factory.mktemp("tree")
    tree = FileTree()
    tree.root.children = {name: node(made) for name, made in children.items()}
    (directory / "volume").mkdir()
    disk = directory / "volume" / "data.raw"
    with workspace(disk.parent) as space:
        write_ext4(tree, disk, SIZE, space)
    assert fsck(disk).clean
    (directory / "out").mkdir()
    debugfs(disk, f"rdump / {directory}/out")
    places = {id(tree.root): os.fsencode(directory / "out")}
    for parent, name, expected in tree.walk():
        path = places[id(expected)] = places[id(parent)] + b"/" + name
        status = os.lstat(path)
        if stat.S_ISLNK(expected.mode):  # rdump does not keep their owner and time
            assert os.readlink(path) == expected.target  # noqa: PTH115
            continue
        mode = expected.mode & ~0o7000  # rdump does not keep these either
        assert (status.st_mode & ~0o7000, status.st_uid, status.st_gid) == (mode, expected.uid, expected.gid)
        assert int(status.st_mtime) == expected.mtime_ns // 10**9
        if expected.content:
            assert Path(os.fsdecode(path)).read_bytes() == b"".join(expected.content.chunks(0, expected.content.size))
        if expected.is_dir:
            assert set(os.listdir(path)) == set(expected.children)  # noqa: PTH208
