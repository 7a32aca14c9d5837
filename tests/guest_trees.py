"""Trees for the tests of copies: made on disk, described, and as records."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from coppice.agent import records
from coppice.agent.records import Content, End, Entry, Item


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


def tree(*items: Item) -> bytes:
    """Return the records of a tree."""
    stream = io.BytesIO()
    records.write(items, stream)
    return stream.getvalue()


def entry(path: str, kind: records.Kind = "f", **fields: Any) -> Entry:
    """Return an entry owned by the user that runs the tests."""
    return Entry(path, kind, uid=os.geteuid(), gid=os.getegid())._replace(**fields)


def file(path: str, data: bytes, **fields: Any) -> list[Item]:
    """Return a file without holes."""
    return [entry(path, **fields), *([Content(0, data)] if data else []), End(len(data))]
