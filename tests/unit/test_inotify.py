"""Watches of files: which of them were written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.errors import IntegrityError
from coppice.linux.inotify import Inotify, Watches


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("more\n")


def test_each_file_has_its_number(tmp_path: Path) -> None:
    """A removed watch and a removed file say nothing any more."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.touch()
    with Watches() as watches:
        a, b, c = map(watches.add, paths)
        assert watches.changed() == set()
        append(paths[0])
        append(paths[2])
        append(paths[2])
        assert watches.changed() == {a, c}
        assert watches.changed() == set()
        watches.remove(a)
        watches.remove(a)
        watches.changed()  # the end of a watch is an event too
        paths[2].unlink()
        watches.changed()
        append(paths[0])
        append(paths[1])
        assert watches.changed() == {b}
        assert watches.add(paths[1]) == b


def test_the_next_user_of_the_descriptor_sees_nothing_of_the_last(tmp_path: Path) -> None:
    """Descriptors are kept for the next use."""
    path = tmp_path / "a"
    path.touch()
    with Watches() as first:
        first.add(path)
        append(path)
        descriptor = first.fileno()
    with Inotify(path) as second:
        assert second.fileno() == descriptor
        assert second.changed() == set()
        append(path)
        second.drain()
        assert second.changed() == set()


def test_a_missing_file_cannot_be_watched(tmp_path: Path) -> None:
    """The others still are."""
    path = tmp_path / "a"
    path.touch()
    with Watches() as watches:
        watch = watches.add(path)
        with pytest.raises(IntegrityError, match="watch"):
            watches.add(tmp_path / "missing")
        append(path)
        assert watches.changed() == {watch}
    with pytest.raises(IntegrityError):
        Inotify(tmp_path / "missing")
