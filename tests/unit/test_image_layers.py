"""Layers are applied as the OCI specification requires, and no member reaches outside the root."""

from __future__ import annotations

import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coppice.errors import ImageError, UnsafePath
from coppice.images.layer import prepare_for_guest
from coppice.images.tree import FileTree
from coppice.images.workspace import Limits
from coppice.stopping import WorkStopped, run
from image_archives import (
    Member,
    apply_layers,
    directory,
    file,
    hardlink,
    names,
    other,
    set_flag,
    symlink,
    tar,
    text,
    workspace,
)


def layered(tmp_path: Path, *layers: list[Member]) -> FileTree:
    """Return the tree after layers of these members."""
    with workspace(tmp_path) as space:
        return apply_layers(space, *(tar(*members) for members in layers))


def test_a_whiteout_hides_entries_of_lower_layers(tmp_path: Path) -> None:
    """`.wh.NAME` removes a file or a whole directory of lower layers, and is not in the result."""
    tree = layered(tmp_path, [file("etc/a"), file("etc/b"), file("opt/x/y/z")], [file("etc/.wh.a"), file("opt/.wh.x")])
    assert names(tree) == {"/etc", "/etc/b", "/opt"}


def test_a_whiteout_spares_its_own_layer(tmp_path: Path) -> None:
    """A whiteout applies only to lower layers, in any order of its own layer's members."""
    before = layered(tmp_path, [file("a/f", b"old")], [file("a/.wh.f"), file("a/f", b"new")])
    after = layered(tmp_path, [file("a/f", b"old")], [file("a/f", b"new"), file("a/.wh.f")])
    assert names(before) == names(after) == {"/a", "/a/f"}


def test_an_opaque_directory_hides_all_lower_content(tmp_path: Path) -> None:
    """`.wh..wh..opq` removes the lower content of a directory, even below a child that the layer
    also has.
    """
    lower = [file("d/one"), file("d/sub/two"), file("other/three")]
    upper = [directory("d"), file("d/sub/new"), file("d/.wh..wh..opq")]
    assert names(layered(tmp_path, lower, upper)) == {"/d", "/d/sub", "/d/sub/new", "/other", "/other/three"}


def test_a_whiteout_of_a_missing_entry_is_accepted(tmp_path: Path) -> None:
    """A whiteout of a missing entry, even in a missing directory, changes and makes nothing."""
    tree = layered(tmp_path, [file("a")], [file("no/such/.wh.thing"), file("gone/.wh..wh..opq"), file(".wh.b")])
    assert names(tree) == {"/a"}


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "a/.wh..."])
def test_a_whiteout_of_a_directory_itself_is_refused(tmp_path: Path, name: str) -> None:
    """A whiteout whose name is empty, `.` or `..` is an attack or a mistake."""
    with pytest.raises(ImageError):
        layered(tmp_path, [file("a/b")], [file(name)])


def test_bookkeeping_of_aufs_is_omitted(tmp_path: Path) -> None:
    """Names that begin with `.wh..wh.` are reserved and never files."""
    assert names(layered(tmp_path, [file("a"), directory(".wh..wh.plnk"), file(".wh..wh.plnk/1.2")])) == {"/a"}


def test_a_rootfs_archive_has_no_whiteouts(tmp_path: Path) -> None:
    """In an archive that is not a layer, `.wh.x` is a plain file name."""
    with workspace(tmp_path) as space:
        tree = apply_layers(space, tar(file("x"), file(".wh.x")), whiteouts=False)
    assert names(tree) == {"/x", "/.wh.x"}


def test_types_replace_each_other(tmp_path: Path) -> None:
    """A later member replaces an earlier one of another type; a directory keeps its children and
    takes the new mode.
    """
    tree = layered(
        tmp_path,
        [file("a/x"), symlink("b", "a"), file("c"), directory("d", 0o700), file("d/keep")],
        [file("a", b"now a file"), directory("b"), symlink("c", "d"), directory("d", 0o711)],
    )
    assert names(tree) == {"/a", "/b", "/c", "/d", "/d/keep"}
    assert text(tree, "a") == b"now a file"
    found = tree.find((b"d",))
    assert found is not None
    assert stat.S_IMODE(found.mode) == 0o711


def test_hard_links_reach_into_lower_layers(tmp_path: Path) -> None:
    """A hard link shares the inode of its target, in its own or a lower layer; replacing one leaves
    the other.
    """
    tree = layered(tmp_path, [file("a", b"one")], [hardlink("b", "a")], [file("a", b"two")])
    assert text(tree, "b") == b"one"
    assert text(tree, "a") == b"two"
    same = layered(tmp_path, [file("a", b"one")], [hardlink("dir/b", "/a")])
    assert same.find((b"a",)) is same.find((b"dir", b"b"))


@pytest.mark.parametrize("target", ["missing", "dir", "etc/passwd"])
def test_a_hard_link_without_a_target_is_refused(tmp_path: Path, target: str) -> None:
    """A hard link to a missing file or a directory is an error, and never links to a file of the
    host.
    """
    with pytest.raises(ImageError):
        layered(tmp_path, [directory("dir"), hardlink("link", target)])


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/../evil", "a/..", "./../x"])
def test_members_with_parent_components_are_refused(tmp_path: Path, name: str) -> None:
    """`..` in the name of a member, or in the target of a hard link, is UnsafePath."""
    with pytest.raises(UnsafePath):
        layered(tmp_path, [file(name, b"evil")])
    with pytest.raises(UnsafePath):
        layered(tmp_path, [file("ok"), hardlink("link", name)])
    with pytest.raises(UnsafePath):
        layered(tmp_path, [symlink("x", "/"), file(f"{name}/.wh.x")])


@pytest.mark.parametrize("target", ["/tmp", "../../../../tmp", "/", "..", "sub/../../../../tmp/.."])
def test_writing_through_a_symlink_stays_inside(tmp_path: Path, target: str) -> None:
    """A layer that writes through the symlink of a lower layer writes inside the root, as under
    chroot.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    tree = layered(
        tmp_path,
        [symlink("link", target), symlink("abs", str(outside))],
        [file("link/evil", b"x"), file("abs/evil", b"x")],
    )
    assert list(outside.iterdir()) == []
    assert not Path("/tmp/evil").exists()
    assert f"{outside}/evil" in names(tree)
    assert "/evil" in names(tree) or "/tmp/evil" in names(tree)


def test_a_symlink_to_a_directory_is_followed_for_parents(tmp_path: Path) -> None:
    """With /lib -> usr/lib, a member lib/x is usr/lib/x, as in every merged-/usr system."""
    tree = layered(tmp_path, [directory("usr/lib"), symlink("lib", "usr/lib")], [file("lib/x"), file("lib/.wh.y")])
    assert names(tree) == {"/usr", "/usr/lib", "/usr/lib/x", "/lib"}


def test_symlink_loops_end(tmp_path: Path) -> None:
    """A loop of symlinks among the parents is refused, not followed forever."""
    with pytest.raises(UnsafePath):
        layered(tmp_path, [symlink("a", "b"), symlink("b", "a"), file("a/x")])


def test_a_member_below_a_file_is_refused(tmp_path: Path) -> None:
    """A member below a regular file is an error."""
    with pytest.raises(ImageError):
        layered(tmp_path, [file("a"), file("a/b")])


def test_the_root_stays_a_directory(tmp_path: Path) -> None:
    """`./` sets the root's mode; a file or symlink in place of the root is refused."""
    assert stat.S_IMODE(layered(tmp_path, [directory("./", 0o711), file("a")]).root.mode) == 0o711
    with pytest.raises(UnsafePath):
        layered(tmp_path, [symlink("./", "/etc")])


def test_devices_and_fifos_need_no_privilege(tmp_path: Path) -> None:
    """Special files become nodes of the image; device numbers that Linux cannot represent are
    refused.
    """
    tree = layered(
        tmp_path,
        [
            other(tarfile.CHRTYPE, "dev/null", device=(1, 3)),
            other(tarfile.BLKTYPE, "b", device=(259, 70000)),
            other(tarfile.FIFOTYPE, "p"),
        ],
    )
    null, block, fifo = (tree.find(path) for path in ((b"dev", b"null"), (b"b",), (b"p",)))
    assert null is not None
    assert (stat.S_ISCHR(null.mode), null.device) == (True, (1, 3))
    assert block is not None
    assert (stat.S_ISBLK(block.mode), block.device) == (True, (259, 70000))
    assert fifo is not None
    assert stat.S_ISFIFO(fifo.mode)
    with pytest.raises(ImageError):
        layered(tmp_path, [other(tarfile.CHRTYPE, "c", device=(4096, 0))])


def test_unknown_member_types_are_refused(tmp_path: Path) -> None:
    """A member of an unknown type does not silently become a file."""
    with pytest.raises(ImageError, match="unknown member type"):
        layered(tmp_path, [other(b"Z", "what")])


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["y" * 200] * 21)])
def test_names_over_the_kernels_limits_are_refused(tmp_path: Path, name: str) -> None:
    """A file system cannot hold a component above 255 bytes or a path above 4096."""
    with pytest.raises(ImageError):
        layered(tmp_path, [file(name)])


def test_odd_times_are_clamped(tmp_path: Path) -> None:
    """A time before 1970 or after every calendar's end does not make an image invalid."""
    tree = layered(tmp_path, [file("old", mtime=-5), file("far", mtime=1e15), file("exact", mtime=1.5)])
    times = [node.mtime_ns for _, _, node in tree.walk()]
    assert times == [1_500_000_000, (1 << 40) * 10**9, 0]


def test_member_bombs_are_bounded(tmp_path: Path) -> None:
    """Too many members, or too many implied directories, are an error that names the limit."""
    with workspace(tmp_path, Limits(max_members=10)) as space, pytest.raises(ImageError, match="10 members"):
        apply_layers(space, tar(*(file(f"f{n}") for n in range(11))))
    with workspace(tmp_path, Limits(max_members=10)) as space, pytest.raises(ImageError):
        apply_layers(space, tar(file("a/b/c/d/e/f/g/h/i/j/k/l")))
    with workspace(tmp_path, Limits(max_header_bytes=100)) as space, pytest.raises(ImageError):
        apply_layers(space, tar(file("x" * 200)))


def test_depth_is_bounded(tmp_path: Path) -> None:
    """Symlinks cannot nest directories deeper than the longest path."""
    chain = [file("/".join("d" * 2000) + "/f"), symlink("deep", "/".join("d" * 2000))]
    with pytest.raises(ImageError, match="deep"):
        layered(tmp_path, chain, [file("deep/" + "/".join("e" * 100) + "/f")])


def test_an_empty_tree_is_refused(tmp_path: Path) -> None:
    """An archive without files is refused, because the image could not start."""
    with pytest.raises(ImageError, match="no files"):
        prepare_for_guest(FileTree())


def test_the_guest_finds_its_mount_points(tmp_path: Path) -> None:
    """Missing mount points are made, and existing ones are left alone."""
    tree = layered(tmp_path, [symlink("tmp", "var/tmp"), directory("proc", 0o700), file("bin/sh")])
    prepare_for_guest(tree)
    assert {"/proc", "/sys", "/dev", "/run", "/tmp", "/etc", "/etc/hosts"} <= names(tree)
    proc, link = tree.find((b"proc",)), tree.find((b"tmp",))
    assert proc is not None
    assert stat.S_IMODE(proc.mode) == 0o700
    assert link is not None
    assert link.target == b"var/tmp"


_COMPONENT = st.sampled_from(["a", "b", "c", "..", ".", "", ".wh.a", ".wh..wh..opq", "d"])
_PATH = st.lists(_COMPONENT, min_size=1, max_size=4).map("/".join)
_MEMBER = st.one_of(
    st.builds(file, _PATH, st.binary(max_size=4)),
    st.builds(directory, _PATH),
    st.builds(symlink, _PATH, st.one_of(_PATH, st.just("/a"), st.just("../.."))),
    st.builds(hardlink, _PATH, _PATH),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.lists(st.lists(_MEMBER, max_size=8), min_size=1, max_size=3))
def test_any_layers_give_a_tree_or_an_image_error(tmp_path: Path, layers: list[list[Member]]) -> None:
    """The result for any layers is a proper tree of plain names (each directory once, no cycle) or
    an ImageError.
    """
    try:
        tree = layered(tmp_path, *layers)
    except ImageError:
        return
    directories = [id(node) for _, _, node in tree.walk() if node.is_dir]
    assert len(directories) == len(set(directories))
    for parent, name, node in tree.walk():
        assert parent.is_dir
        assert name not in (b"", b".", b"..")
        assert b"/" not in name
        assert node.is_dir or not (node.children or name.startswith(b".wh."))


def test_a_cancelled_caller_stops_the_work(tmp_path: Path) -> None:
    """The thread that applies a layer stops when its caller is cancelled."""
    with workspace(tmp_path) as space, pytest.raises(WorkStopped):
        run(set_flag(), apply_layers, space, tar(file("a")))
