"""A tree of a guest is never written outside its destination, whatever the guest sends."""

from __future__ import annotations

import contextlib
import io
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_process import names
from coppice.agent import records
from coppice.agent.records import Content, End, Entry, Item
from coppice.agent.unpack import unpack
from coppice.errors import CoppiceError, GuestProtocolError, NoSpace, UnsafePath
from guest_trees import entry, file, tree

REFUSED: dict[str, list[Item]] = {
    "absolute": file("/escaped", b""),
    "parent": file("top/../../escaped", b""),
    "device": [entry("top", "c")],
    "pipe": [entry("top/pipe", "p")],
    "absolute link": [entry("top/link", "l", link="/etc/passwd")],
    "link up and out": [entry("top/link", "l", link="../outside")],
    "link with a null byte": [entry("top/deeper/link", "l", link="a\0b")],
    "path with a null byte": [entry("top/a\0b", "d")],
    "top is a link": [entry("top", "l", link="outside")],
    "down and up": [
        entry("top/a/b", "d"),
        entry("top/a/b/c", "l", link="../.."),
        entry("top/link", "l", link="a/b/c/../.."),
    ],
    "through a link": [entry("top/d", "l", link="e"), *file("top/d/file", b"")],
    "hard link out": [entry("top/hard", "h", link="outside")],
    "hard link up": [entry("top/hard", "h", link="top/../outside")],
    "hard link to the top": [entry("top/hard", "h", link="top")],
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_hostile_trees_are_refused(tmp_path: Path, case: str) -> None:
    """An entry that leads outside the copy is refused, and nothing outside the copy changes."""
    (tmp_path / "outside").write_bytes(b"secret")
    with pytest.raises(UnsafePath):
        unpack(iter(REFUSED[case]), tmp_path, "copy")
    assert set(names(tmp_path)) <= {"outside", "copy"}
    assert (tmp_path / "outside").read_bytes() == b"secret"
    assert (tmp_path / "outside").stat().st_nlink == 1


@pytest.mark.parametrize("case", list(REFUSED))
def test_links_out_of_a_tree_are_made_on_request_and_never_followed(tmp_path: Path, case: str) -> None:
    """With links that lead out, all other hostile entries are refused as before."""
    (tmp_path / "outside").write_bytes(b"secret")
    links = {
        each.path.removeprefix("top/"): each.link
        for each in REFUSED[case]
        if isinstance(each, Entry) and each.kind == "l"
    }
    if case in {"absolute link", "link up and out", "top is a link", "down and up"}:
        unpack(iter(REFUSED[case]), tmp_path, "copy", outside_links=True)
        copy = tmp_path / "copy"
        assert links == {path: str((copy if path == "top" else copy / path).readlink()) for path in links}
    else:
        with pytest.raises(UnsafePath):
            unpack(iter(REFUSED[case]), tmp_path, "copy", outside_links=True)
    through = [entry("top/d", "l", link="../outside_directory"), *file("top/d/file", b"")]
    (tmp_path / "outside_directory").mkdir()
    with pytest.raises(UnsafePath, match="through a link"):
        unpack(iter(through), tmp_path, "second", outside_links=True)
    assert (tmp_path / "outside").read_bytes() == b"secret"
    assert names(tmp_path / "outside_directory") == []


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    """An entry with the name of a link replaces the link, whether it came with this tree or before it."""
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "old").symlink_to(tmp_path / "outside")
    items = [*file("top/old", b"new"), entry("top/twice", "l", link="old"), *file("top/twice", b"mine")]
    unpack(iter(items), tmp_path, "copy")
    assert (tmp_path / "outside").read_bytes() == b"secret"
    assert (tmp_path / "copy" / "old").read_bytes() == b"new"
    assert (tmp_path / "copy" / "twice").read_bytes() == b"mine"


def test_set_id_and_write_bits_for_others_are_dropped(tmp_path: Path) -> None:
    """Copied files have no set-id bits and no write permission for others."""
    unpack(iter(file("top", b"x", mode=0o6777)), tmp_path, "copy")
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "items", [[Content(0, b"x")], [End(0)], [entry("top"), Content(0, b"x")], [entry("top"), entry("b")]]
)
def test_content_in_the_wrong_place_is_refused(tmp_path: Path, items: list[Item]) -> None:
    """Content without a file, and a file without its end, are errors."""
    with pytest.raises(GuestProtocolError):
        unpack(iter(items), tmp_path, "copy")


def test_a_record_too_long_is_refused() -> None:
    """A record of 4 GiB is refused before it is read."""
    with pytest.raises(GuestProtocolError):
        list(records.read(io.BytesIO(b"\1\xff\xff\xff\xff" + bytes(100_000))))


def test_a_hole_counts_as_content(tmp_path: Path) -> None:
    """A guest cannot make a file beyond the bound with holes: readers of the copy see all of it."""
    far: list[Item] = [Content(1 << 40, b"x"), End((1 << 40) + 1)]
    for items in ([End(1 << 40)], far):
        with pytest.raises(NoSpace):
            unpack(iter([entry("top"), *items]), tmp_path, "copy", max_bytes=1 << 30)


@given(edits=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=8), size=st.integers(0, 700))
def test_damaged_trees_raise_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], size: int
) -> None:
    """Any bytes are either unpacked below the destination or refused with one of Coppice's errors."""
    parent = tmp_path_factory.mktemp("damaged")
    data = bytearray(tree(entry("top", "d"), *file("top/" + "n" * 120, b"contents"), entry("top/link", "l", link="n")))
    for at, value in edits:
        if at < len(data):
            data[at] = value
    with contextlib.suppress(CoppiceError, OSError):
        unpack(records.read(io.BytesIO(data[: size or len(data)])), parent, "copy", max_bytes=1 << 20)
    assert set(names(parent)) <= {"copy"}
