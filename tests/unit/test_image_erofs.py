"""The EROFS writer: contents are read back unchanged, and equal trees give equal files."""

from __future__ import annotations

import stat
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coppice.errors import ImageError
from coppice.images.erofs import write_erofs
from coppice.images.tree import Bytes, FileTree, Node
from image_archives import Entry, read_erofs

MANY = 1 << 40


def regular(data: bytes = b"", mode: int = 0o644, **more: object) -> Node:
    """Return a regular file."""
    node = Node(stat.S_IFREG | mode, content=Bytes(data))
    for key, value in more.items():
        setattr(node, key, value)
    return node


def written(tree: FileTree, path: Path) -> dict[str, Entry]:
    """Return the tree as read back from the image."""
    with path.open("wb") as file:
        write_erofs(tree, file, max_bytes=MANY)
    return read_erofs(path)


def test_all_properties_of_an_inode_are_kept(tmp_path: Path) -> None:
    """Modes with setuid, large owners, nanoseconds, devices, symlinks, hard links and capabilities
    are kept.
    """
    tree = FileTree()
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    xattrs = {b"security.capability": capability, b"user.note": b"", b"system.unknown": b"dropped"}
    program = regular(b"#!", 0o4755, uid=70_000, gid=4_000_000_000, mtime_ns=1_700_000_000_123_456_789, xattrs=xattrs)
    tree.put((b"bin", b"su"), program)
    tree.link((b"bin", b"sudo"), (b"bin", b"su"))
    tree.put((b"sh",), Node(stat.S_IFLNK | 0o777, target=b"bin/su"))
    tree.put((b"tty",), Node(stat.S_IFCHR | 0o620, device=(5, 1)))
    tree.put((b"disk",), Node(stat.S_IFBLK | 0o660, device=(259, 70_000)))
    tree.put((b"pipe",), Node(stat.S_IFIFO | 0o600))
    tree.put((b"tmp",), Node(stat.S_IFDIR | 0o1777))
    found = written(tree, tmp_path / "i")
    su = found["/bin/su"]
    assert (su.permissions, su.uid, su.gid, su.links) == (0o4755, 70_000, 4_000_000_000, 2)
    assert (su.mtime_ns, su.data) == (1_700_000_000_123_456_789, b"#!")
    assert su.xattrs == {"security.capability": capability, "user.note": b""}
    assert found["/bin/sudo"] == su
    assert (found["/sh"].data, found["/sh"].mode) == (b"bin/su", stat.S_IFLNK | 0o777)
    assert (found["/tty"].device, found["/disk"].device) == ((5, 1), (259, 70_000))
    assert stat.S_ISFIFO(found["/pipe"].mode)
    assert (found["/tmp"].permissions, found["/tmp"].links, found["/"].links) == (0o1777, 2, 4)


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049, 4031, 4095, 4096, 4097, 6144, 12289])
def test_sizes_around_the_block_boundaries(tmp_path: Path, size: int) -> None:
    """A file is complete whether its tail is stored next to the inode, in a separate block, or not
    at all.
    """
    tree = FileTree()
    data = bytes(index * 7 % 251 for index in range(size))
    for number in range(5):
        tree.put((b"f%d" % number,), regular(data, xattrs={b"user.x": b"v" * number * 900}))
    found = written(tree, tmp_path / "i")
    assert {found[f"/f{number}"].data for number in range(5)} == {data}
    assert len(found["/f4"].xattrs["user.x"]) == 3600


def test_attributes_may_span_blocks(tmp_path: Path) -> None:
    """Extended attributes larger than a block continue in the next ones."""
    tree = FileTree()
    values = {b"user.big": bytes(range(256)) * 40, b"trusted.more": b"m" * 5000}
    tree.put((b"a",), regular(b"inline?", xattrs=values))
    tree.put((b"b",), Node(stat.S_IFLNK | 0o777, target=b"t" * 4000, xattrs={b"trusted.x": b"y" * 100}))
    found = written(tree, tmp_path / "i")
    assert found["/a"].xattrs == {name.decode(): value for name, value in values.items()}
    assert found["/a"].data == b"inline?"
    assert found["/b"].data == b"t" * 4000


def test_more_attributes_than_fit_are_refused(tmp_path: Path) -> None:
    """Attributes that the format cannot hold are an error, not a truncated image."""
    tree = FileTree()
    tree.put((b"a",), regular(xattrs={b"user.%d" % number: b"v" * 65_000 for number in range(5)}))
    with pytest.raises(ImageError), (tmp_path / "i").open("wb") as file:
        write_erofs(tree, file, max_bytes=MANY)


def test_a_directory_may_span_blocks(tmp_path: Path) -> None:
    """A directory of many blocks lists all its entries in byte order, with names of any bytes and
    any length.
    """
    tree = FileTree()
    names = {b"%05d" % number + b"n" * (number % 200) for number in range(2000)} | {b"-first", b"\xff\xfe", b"z" * 255}
    for name in names:
        tree.put((b"d", name), regular())
    found = written(tree, tmp_path / "i")
    expected = {"/d/" + name.decode("utf-8", "surrogateescape") for name in names}
    assert {path for path in found if path.startswith("/d/")} == expected


def test_the_same_tree_is_the_same_file(tmp_path: Path) -> None:
    """The order in which a tree was made does not matter, so the digest identifies the content."""
    digests = set()
    for order in (1, -1):
        tree = FileTree()
        for number in range(50)[::order]:
            tree.put((b"d%d" % (number % 7), b"f%d" % number), regular(b"x" * number, mtime_ns=number))
        with (tmp_path / f"i{order}").open("wb") as file:
            digests.add(write_erofs(tree, file, max_bytes=MANY))
    assert len(digests) == 1


def test_an_image_over_the_limit_is_refused_before_writing(tmp_path: Path) -> None:
    """The planned size decides, whatever sizes the archive claims."""
    tree = FileTree()
    tree.put((b"a",), regular(bytes(8192)))
    with (tmp_path / "i").open("wb") as file, pytest.raises(ImageError, match="more than allowed"):
        write_erofs(tree, file, max_bytes=8192)
    assert (tmp_path / "i").stat().st_size == 0


def test_fsck_extracts_the_same_files(tmp_path: Path) -> None:
    """The format's own tool reads the written bytes, so the tests do not depend only on their own
    reader.
    """
    tree = FileTree()
    contents = {b"f%d" % size: bytes(size % 251 for _ in range(size)) for size in (0, 5, 2000, 3000, 4096, 70_000)}
    for name, data in contents.items():
        tree.put((b"some", b"where", name), regular(data))
    image = tmp_path / "i"
    with image.open("wb") as file:
        write_erofs(tree, file, max_bytes=MANY)
    target = tmp_path / "out"
    subprocess.run(["fsck.erofs", f"--extract={target}", str(image)], check=True, capture_output=True)
    found = {path.name.encode(): path.read_bytes() for path in (target / "some/where").iterdir()}
    assert found == contents


_NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: name not in (b".", b"..") and not set(name) & {0, 0x2F})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.dictionaries(st.lists(_NAMES, min_size=1, max_size=3).map(tuple), st.binary(max_size=9000), max_size=12))
@example(  # the last inode ends exactly at the end of a block
    files={
        (b"\x03", b"\x01"): b"",
        (b"\x01\x02", b"\x01"): b"\x00",
        (b"\x01\x01\x01\x01", b"\x01"): b"\x00",
        (b"\x01", b"\x01", b"\x01"): b"\x00",
        (b"\x02", b"\x01", b"\x01"): b"\x00",
        (b"\x01\x01", b"\x01", b"\x01"): b"\x00",
        (b"\x01\x03", b"\x01", b"\x01"): b"",
        (b"\x01\x01\x01", b"\x01", b"\x01"): b"\x00",
        (b"\x01\x01\x01\x01\x01", b"\x01", b"\x01"): b"\x00",
    }
)
def test_any_tree_is_read_back(tmp_path: Path, files: dict[tuple[bytes, ...], bytes]) -> None:
    """The image has the files of any tree."""
    tree = FileTree()
    kept = {}
    for path, data in files.items():
        if any(path[:cut] in kept for cut in range(1, len(path))) or tree.find(path) is not None:
            continue  # a file has no children
        tree.put(path, regular(data))
        kept[path] = data
    found = written(tree, tmp_path / "i")
    assert {path: entry.data for path, entry in found.items() if stat.S_ISREG(entry.mode)} == {
        "/" + b"/".join(path).decode("utf-8", "surrogateescape"): data for path, data in kept.items()
    }
