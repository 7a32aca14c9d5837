"""`coppice cp -` unpacks a tar archive into a guest, and writes one of a guest's files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

import pytest

from cli_host import FakeHost
from cli_lines import document, run
from coppice.agent import records
from coppice.agent.records import Content, End, Entry, Item
from coppice.model import FileStat
from coppice.model.guest import Unpacked


class CopySession:
    """A guest with one file, and a list of what was sent to it."""

    def __init__(self) -> None:
        self.taken: list[Item] = []
        self.directory = ""

    async def stat(self, path: str, *, follow: bool = False) -> FileStat:
        return FileStat(path=path, kind="d", size_bytes=0, mode=0o755, uid=0, gid=0, mtime=0)

    async def tree_in(self, directory: str, packed: AsyncIterable[bytes]) -> Unpacked:
        self.directory = directory
        self.taken = list(records.read(io.BytesIO(b"".join([chunk async for chunk in packed]))))
        return Unpacked(members=len(self.taken), content_bytes=4)

    async def tree_out(self, path: str, *, contents: bool = False) -> AsyncIterator[bytes]:
        stream = io.BytesIO()
        records.write([Entry(f"{path}, {contents}", "f", size=4), Content(0, b"data"), End(4)], stream)
        yield stream.getvalue()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive on standard input."""
    with tarfile.open(tmp_path / "archive.tar", "w") as tar:
        member = tarfile.TarInfo("dir/file")
        member.size, member.uid, member.mtime = 4, 1000, 1_700_000_000
        tar.addfile(member, io.BytesIO(b"data"))
    return tmp_path / "archive.tar"


def test_an_archive_is_unpacked_with_its_owners(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cp - NAME:DIR` sends the members of standard input, as the archive has them."""
    session = CopySession()
    with archive.open("rb") as file:
        monkeypatch.setattr("coppice.cli.guest._STDIN", file.fileno())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        assert document(capsys, FakeHost(open_copy=session), "cp", "-", "vm:/srv") == {"bytes": 4}
    entry, *content = session.taken
    assert session.directory == "/srv"
    assert entry == Entry("dir/file", "f", 0o644, 1000, 0, 1_700_000_000 * 10**9, size=4)
    assert content == [Content(0, b"data"), End(4)]


@pytest.mark.parametrize(("path", "name"), [("srv", "srv, False"), ("srv/.", "srv/., True")])
def test_files_are_written_as_an_archive(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """`cp NAME:PATH -` writes an archive to standard output; `DIR/.` is a directory's content."""
    with (tmp_path / "out.tar").open("wb") as file:
        monkeypatch.setattr("coppice.cli.guest._STDOUT", file.fileno())
        assert run(FakeHost(open_copy=CopySession()), "cp", f"vm:{path}", "-") == 0
    with tarfile.open(tmp_path / "out.tar") as tar:
        (member,) = tar.getmembers()
        inside = tar.extractfile(member)
        assert inside is not None
        assert (member.name, inside.read()) == (name, b"data")
    assert capsysbinary.readouterr().out == b""


def test_damaged_input_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard input that is no archive is reported, with a hint."""
    (tmp_path / "noise").write_bytes(b"no archive" * 1000)
    with (tmp_path / "noise").open("rb") as file:
        monkeypatch.setattr("coppice.cli.guest._STDIN", file.fileno())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        assert run(FakeHost(open_copy=CopySession()), "cp", "-", "vm:/srv") == 2
    assert "not a tar archive" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-", "-"], ["-", "here"], ["here", "-"]])
def test_one_end_is_in_a_guest(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An archive goes into or out of a guest."""
    assert run(FakeHost(), "cp", *words) == 2
    assert "neither end is in an instance" in capsys.readouterr().err


def test_an_archive_is_not_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes of an archive are no document."""
    answer = document(capsys, FakeHost(open_copy=CopySession()), "cp", "vm:/srv", "-", status=2)
    assert "JSON" in answer["error"]["message"]
