"""`coppice files`: the requests to the host, and the output for people and for programs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cli_host import FakeHost
from cli_lines import document, output_of, run
from coppice.errors import GuestRefused
from coppice.model import FileEvent, FileStat
from coppice.requests import (
    FileLsRequest,
    FileMkdirRequest,
    FileMvRequest,
    FileRmRequest,
    FileWatchRequest,
    Request,
    StatRequest,
)


def found(path: str, kind: Any = "f", **more: Any) -> FileStat:
    """Return the status of a path."""
    fields: dict[str, Any] = {"size_bytes": 5, "mode": 0o640, "uid": 1, "gid": 2, "mtime": 1_700_000_000.0}
    return FileStat(path=path, kind=kind, **(fields | more))


ENTRIES = [
    found("/etc/b\udcff"),
    found("/etc/a", "d", mode=0o1777),
    found("/etc/c\x1b[2J", "l", link_target="a"),
]


def test_ls_sorts_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Entries are sorted by name. Control characters reach no terminal, and other bytes no document."""
    host = FakeHost(file_ls=ENTRIES)
    _, *lines = output_of(capsys, host, "files", "ls", "vm:/etc").splitlines()
    assert host.calls == [FileLsRequest(instance="vm", path="/etc")]
    assert [line.split()[0] for line in lines] == ["drwxrwxrwt", "-rw-r-----", "lrw-r-----"]
    assert "1:2" in lines[0]
    assert lines[2].endswith("-> a")
    assert "\x1b" not in "".join(lines)
    assert output_of(capsys, host, "files", "ls", "-q", "vm:/etc").splitlines()[0] == "a"
    assert [each["path"] for each in document(capsys, host, "files", "ls", "vm:/etc")][:2] == ["/etc/a", "/etc/b\ufffd"]


def test_stat_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A link is described itself, unless it is dereferenced."""
    host = FakeHost(stat=ENTRIES[1])
    assert output_of(capsys, host, "files", "stat", "-L", "vm:/etc/a").startswith("drwxrwxrwt  1:2")
    assert host.asked("stat") == {"instance": "vm", "path": "/etc/a", "follow_links": True}
    assert document(capsys, host, "files", "stat", "vm:/etc/a")["kind"] == "d"


def test_several_directories_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each list has a heading, as with `ls`. One that does not exist does not hide the others."""
    host = FakeHost(file_ls=ENTRIES[:2])
    lines = output_of(capsys, host, "files", "ls", "-q", "vm:/etc", "elm:/etc").splitlines()
    assert lines == ["vm:/etc:", "a", "b\ufffd", "", "elm:/etc:", "a", "b\ufffd"]
    answer = document(capsys, host, "files", "ls", "vm:/etc", "nobody:/etc", status=3)
    assert [(each["name"], len(each["entries"])) for each in answer["found"]] == [("vm:/etc", 2)]
    assert [each["name"] for each in answer["failed"]] == ["nobody:/etc"]


def test_several_paths_are_described_and_made(capsys: pytest.CaptureFixture[str]) -> None:
    """Each path has a line, or an error of its own."""

    def answer(request: StatRequest | FileMkdirRequest) -> Any:
        if request.path == "/b":
            raise GuestRefused("the guest refused: /b: Input/output error", errno=5, hint="look")
        return ENTRIES[1] if isinstance(request, StatRequest) else None

    host = FakeHost(stat=answer, file_mkdir=answer)
    assert run(host, "files", "stat", "vm:/a", "vm:/b", "elm:/c") == 1
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["drwxrwxrwt"] * 2
    assert "/b: Input/output error" in shown.err
    described = document(capsys, host, "files", "stat", "vm:/a", "vm:/b", status=1)
    assert [(each["name"], each["path"]) for each in described["found"]] == [("vm:/a", "/etc/a")]
    assert [each["name"] for each in described["failed"]] == ["vm:/b"]
    made = document(capsys, host, "files", "mkdir", "vm:/a", "vm:/b", "elm:/c", status=1)
    assert made["done"] == [{"name": "vm:/a"}, {"name": "elm:/c"}]
    assert [each["name"] for each in made["failed"]] == ["vm:/b"]
    assert document(capsys, host, "files", "mkdir", "vm:/a") == {"path": "/a"}


def test_directories_are_made_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """A later one may be in an earlier one, which takes its time."""
    made: list[str] = []

    async def answer(request: FileMkdirRequest) -> None:
        await asyncio.sleep(0 if made else 0.01)
        made.append(request.path)

    assert run(FakeHost(file_mkdir=answer), "files", "mkdir", "vm:/a", "vm:/a/b", "vm:/a/b/c") == 0
    assert made == ["/a", "/a/b", "/a/b/c"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (
            ["mkdir", "-p", "-m", "2770", "vm:/a/b"],
            FileMkdirRequest(instance="vm", path="/a/b", parents=True, mode=0o2770),
        ),
        (["mkdir", "vm:/a:b"], FileMkdirRequest(instance="vm", path="/a:b")),
        (["mv", "-n", "vm:/a", "/b"], FileMvRequest(instance="vm", path="/a", destination="/b", keep_existing=True)),
        (["mv", "vm:/a", "vm:/b"], FileMvRequest(instance="vm", path="/a", destination="/b")),
        (["rm", "-rf", "vm:/a"], FileRmRequest(instance="vm", path="/a", recursive=True, missing_ok=True)),
    ],
)
def test_changes_pass_their_options_on(
    words: list[str], call: Request[None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The options reach the host. Only removed paths are printed, as by each `rm`."""
    host = FakeHost(file_mkdir=None, file_mv=None, file_rm=None)
    assert output_of(capsys, host, "files", *words) == ("vm:/a\n" if words[0] == "rm" else "")
    assert host.calls == [call]


def test_each_path_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    """A path that cannot be removed does not keep the others."""

    def remove(request: FileRmRequest) -> None:
        if request.path == "/b":
            raise GuestRefused("the guest refused: /b: Directory not empty", errno=39, hint="rm -r")

    host = FakeHost(file_rm=remove)
    answer = document(capsys, host, "files", "rm", "vm:/a", "vm:/b", "elm:/c", status=1)
    assert answer["removed"] == ["vm:/a", "elm:/c"]
    assert list(answer["failed"]) == ["vm:/b"] or answer["failed"][0]["name"] == "vm:/b"


def test_watch_prints_events_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per event; with --json one document per line."""
    events = [
        FileEvent(kind="watching", path="/etc"),
        FileEvent(kind="created", path="/etc/new", is_directory=True),
        FileEvent(kind="moved_from", path="/etc/\udcff", cookie=7),
        FileEvent(kind="gone", path="/etc"),
    ]
    host = FakeHost(file_watch=events)
    assert output_of(capsys, host, "files", "watch", "-r", "vm:/etc").splitlines() == [
        "watching  /etc",
        "created  /etc/new/",
        "moved_from  /etc/\ufffd",
        "gone  /etc",
    ]
    assert host.calls == [FileWatchRequest(instance="vm", path="/etc", recursive=True)]
    lines = output_of(capsys, host, "--json", "files", "watch", "vm:/etc").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [event.kind for event in events]


@pytest.mark.parametrize(
    "words", [["ls", "/etc"], ["stat", "vm:"], ["mkdir", ":/x"], ["mkdir", "-m", "9", "vm:/x"], ["rm", "vm"]]
)
def test_what_names_no_path_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The hint says what to write."""
    assert run(FakeHost(), "files", *words) == 2
    assert capsys.readouterr().err
