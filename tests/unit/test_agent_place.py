"""Every combination of source and destination, in both directions, has the outcome of the real `cp
-r`.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_process import agent_session
from coppice.agent.copy import copy_in, copy_out
from coppice.agent.session import Session
from coppice.errors import CoppiceError, NotFound, UnsafePath, UsageError

SOURCES = ("file", "file/", "dir", "dir/", "dir/.", "link", "dlink", "dlink/", "dlink/.", "missing")
DESTINATIONS = (
    "new", "new/", "new/.", "old", "old/", "into", "into/", "into/.", "into/new", "into/new/",
    "clash", "no/new", "no/new/", "tofile", "todir", "todir/",
)  # fmt: skip


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    async with agent_session() as session:
        yield session


def plant(root: Path) -> None:
    """Make sources of each kind, and destinations for them."""
    (root / "dir" / "sub").mkdir(parents=True)
    (root / "dir" / "sub" / "deep").write_text("deep")
    (root / "dir" / "inner").symlink_to("sub/deep")
    (root / "file").write_text("file")
    (root / "link").symlink_to("file")
    (root / "dlink").symlink_to("dir")
    (root / "old").write_text("old")
    (root / "into").mkdir()
    (root / "into" / "kept").write_text("kept")
    for name in ("clash/file", "clash/link", "clash/dlink"):
        (root / name).mkdir(parents=True)
    (root / "clash" / "dir").write_text("a file in the way")
    (root / "tofile").symlink_to("old")
    (root / "todir").symlink_to("into")


def tree(root: Path) -> dict[str, str]:
    """Return names with the contents of files and the targets of links."""
    return {
        str(path.relative_to(root)): f"-> {path.readlink()}"
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else "directory"
        for path in sorted(root.rglob("*"))
    }


def by_cp(root: Path, source: str, destination: str) -> tuple[bool, dict[str, str]]:
    """Return whether `cp -r` succeeds, and the tree that it leaves."""
    plant(root)
    ended = subprocess.run(["cp", "-r", source, destination], cwd=root, capture_output=True, check=False)
    return ended.returncode == 0, tree(root)


@pytest.mark.parametrize("way", ["in", "out"])
async def test_each_copy_goes_where_cp_puts_it(session: Session, tmp_path: Path, way: str) -> None:
    """A copy has the names, the contents and the refusals of `cp -r`; a refused copy leaves
    nothing.
    """
    differing: dict[tuple[str, str], object] = {}
    for number, (source, destination) in enumerate(itertools.product(SOURCES, DESTINATIONS)):
        theirs, ours = tmp_path / f"cp-{number}", tmp_path / f"ours-{number}"
        done, wanted = by_cp(theirs, source, destination)
        plant(ours)
        before = tree(ours)
        ends = f"{ours}/{source}", f"{ours}/{destination}"
        error: CoppiceError | None = None
        try:
            await (copy_in(session, *ends) if way == "in" else copy_out(session, *ends))
        except CoppiceError as refusal:
            error = refusal
        # a guest could lead the host anywhere through a link
        if way == "out" and source in ("link", "dlink") and done:
            assert isinstance(error, UnsafePath), (source, destination)
        elif (error is None, tree(ours)) != (done, wanted if done else before):
            differing[source, destination] = (error, done, sorted(tree(ours).items() ^ wanted.items()))
        shutil.rmtree(theirs)
        shutil.rmtree(ours)
    assert differing == {}


@pytest.mark.parametrize(
    ("source", "destination", "kind", "message", "hint"),
    [
        ("file", "new/", NotFound, "/new/ does not exist", "mkdir -p"),
        ("file", "no/new", NotFound, "/no does not exist", "mkdir -p"),
        ("file", "old/", UsageError, "/old is not a directory", "without a slash"),
        ("dir", "old", UsageError, "/old is not a directory", "another name"),
        ("file", "clash", UsageError, "/clash/file is a directory", "another name"),
    ],
)
@pytest.mark.parametrize("way", ["in", "out"])
async def test_a_refused_copy_has_a_hint(
    session: Session,
    tmp_path: Path,
    source: str,
    destination: str,
    kind: type[CoppiceError],
    message: str,
    hint: str,
    way: str,
) -> None:
    """The message names the path; the hint names the command for the side on which the directory is
    missing.
    """
    plant(tmp_path)
    ends = f"{tmp_path}/{source}", f"{tmp_path}/{destination}"
    with pytest.raises(kind, match=message) as caught:
        await (copy_in(session, *ends) if way == "in" else copy_out(session, *ends))
    assert hint in (caught.value.hint or "")
    assert ("coppice exec NAME -- mkdir" in (caught.value.hint or "")) is (way == "in" and "mkdir" in hint)
