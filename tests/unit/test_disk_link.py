"""Ownership by hard link: the result is the same inode or a reported copy."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from coppice.errors import HostCannot, IntegrityError, Refused
from coppice.linux.link import link_or_copy
from coppice.model import Sharing


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"guest ram" * 1000)
    path.chmod(0o444)
    return path


def test_link_is_the_same_inode(source: Path, tmp_path: Path) -> None:
    """A link costs no bytes, needs no reason, and survives the deletion of the source."""
    assert link_or_copy(source, tmp_path / "own") == (Sharing.HARDLINK, "", 0)
    assert (tmp_path / "own").stat().st_ino == source.stat().st_ino
    contents = source.read_bytes()
    source.unlink()
    assert (tmp_path / "own").read_bytes() == contents


def test_link_is_immutable(source: Path, tmp_path: Path) -> None:
    """The file has mode 0444 afterwards, even if the source was left writable."""
    source.chmod(0o644)
    link_or_copy(source, tmp_path / "own")
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o444


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_a_copy_gives_its_reason(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """If the file system cannot link, the copy is equal, immutable and counted, and gives the
    reason.
    """

    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    result = link_or_copy(source, tmp_path / "own")
    assert result.sharing is Sharing.COPY
    assert len(result.reason) > 20
    assert (tmp_path / "own").stat().st_ino != source.stat().st_ino
    assert (tmp_path / "own").read_bytes() == source.read_bytes()
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o444


def test_other_failures_are_raised(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is an error, not a reason to write more to it."""

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", broken)
    with pytest.raises(HostCannot):
        link_or_copy(source, tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("occupant", ["file", "dangling link"])
def test_existing_destination_is_refused(source: Path, tmp_path: Path, occupant: str) -> None:
    """A link never replaces an existing file."""
    if occupant == "file":
        (tmp_path / "own").write_bytes(b"mine")
    else:
        (tmp_path / "own").symlink_to("nowhere")
    with pytest.raises(Refused):
        link_or_copy(source, tmp_path / "own")
    assert source.stat().st_nlink == 1


def test_a_symbolic_link_is_not_an_owner(source: Path, tmp_path: Path) -> None:
    """A source that is a symbolic link is refused, and a missing source is an integrity error."""
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(HostCannot):
        link_or_copy(tmp_path / "alias", tmp_path / "own")
    with pytest.raises(IntegrityError):
        link_or_copy(tmp_path / "missing", tmp_path / "own")


def test_a_source_replaced_meanwhile_is_detected(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another file takes the source's name between the check and the link, the fork does not get
    it.
    """
    link = os.link

    def raced(src: Path, dst: Path, *, follow_symlinks: bool) -> None:
        other = tmp_path / "other"
        other.write_bytes(b"somebody else's ram")
        other.rename(src)
        link(src, dst, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "link", raced)
    with pytest.raises(IntegrityError, match="replaced"):
        link_or_copy(source, tmp_path / "own")
    assert not (tmp_path / "own").exists()
