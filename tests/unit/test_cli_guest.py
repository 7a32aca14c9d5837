"""cp and logs: their requests to the host, and the bytes that they pass on."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator

import pytest

from cli_host import FakeHost
from cli_lines import document, output_of, run
from coppice.cli.ending import Interrupted
from coppice.errors import GuestError
from coppice.model import MIB, Progress, ProgressSink
from coppice.requests import CpInRequest, CpOutRequest, LogsRequest, Request


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["cp", "vm:/etc/x", "here"], CpOutRequest(instance="vm", guest_path="/etc/x", host_path="here")),
        (
            ["cp", "--outside-links", "vm:/etc", "."],
            CpOutRequest(instance="vm", guest_path="/etc", host_path=".", outside_links=True),
        ),
        (["cp", "here", "vm:/tmp/"], CpInRequest(instance="vm", host_path="here", guest_path="/tmp/")),
    ],
)
def test_cp_copies_in_the_written_direction(
    words: list[str], call: Request[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The side with the instance decides the direction."""
    host = FakeHost(cp_in=2 * MIB, cp_out=2 * MIB)
    assert output_of(capsys, host, *words) == "2.0 MiB copied\n"
    assert host.calls == [call]
    assert document(capsys, host, *words) == {"bytes": 2 * MIB}


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.amount_shown = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if "1.0 MiB of 2.0 MiB" in text:
            self.amount_shown.set()
        return super().write(text)


@pytest.mark.parametrize("way", [["vm:/x", "here"], ["here", "vm:/x"]])
@pytest.mark.parametrize("json_", [False, True])
def test_cp_shows_its_progress(monkeypatch: pytest.MonkeyPatch, way: list[str], json_: bool) -> None:
    """Progress is shown on a terminal and not in a pipe, even if the last step comes before the
    first picture.
    """
    terminal = Terminal()

    async def copy(_: Request[int], progress: ProgressSink) -> int:
        progress(Progress(stage="copy", done=MIB, total=2 * MIB, unit="bytes"))
        if not json_:
            assert await asyncio.to_thread(terminal.amount_shown.wait, 30)
        return 2 * MIB

    monkeypatch.setattr("sys.stderr", terminal)
    assert run(FakeHost(cp_in=copy, cp_out=copy), *(["--json"] if json_ else []), "cp", *way) == 0
    assert terminal.amount_shown.is_set() is not json_
    assert terminal.getvalue() == "" or not json_


def test_quick_work_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of a quarter of a second does not wait for the progress display to load."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("coppice.cli.progress._DELAY_S", 600.0)

    def copy(_: Request[int], progress: ProgressSink) -> int:
        progress(Progress(stage="copy", done=MIB, total=2 * MIB, unit="bytes"))
        return 2 * MIB

    assert run(FakeHost(cp_in=copy), "cp", "here", "vm:/x") == 0
    assert terminal.getvalue() == ""


def test_logs_are_passed_through_unchanged(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """In a pipe a log is copied byte for byte; as JSON it is text."""
    host = FakeHost(logs=[b"a\xff\x1b[2J\r", b""])
    assert run(host, "logs", "vm", "-n", "5", "--vmm") == 0
    assert capsysbinary.readouterr().out == b"a\xff\x1b[2J\r\n\n"
    assert host.asked("logs") == {"instance": "vm", "source": "vmm", "tail": 5, "follow": False}
    assert run(host, "--json", "logs", "vm") == 0
    assert json.loads(capsysbinary.readouterr().out) == {"lines": ["a�\x1b[2J\r", ""]}


@pytest.mark.parametrize(
    ("error", "code"), [(GuestError("it broke", hint="look"), "guest_error"), (Interrupted(15), "interrupted")]
)
def test_a_log_that_fails_midway_is_one_json_document(
    capsys: pytest.CaptureFixture[str], error: Exception, code: str
) -> None:
    """Lines are printed as they come, not held in memory; a later error ends the same document."""
    printed: list[str] = []

    class Breaking(FakeHost):
        async def _log(self, request: LogsRequest) -> AsyncIterator[bytes]:
            yield b"one"
            printed.append(capsys.readouterr().out)
            yield b"two"
            raise error

    status = run(Breaking(), "--json", "logs", "vm")
    shown = capsys.readouterr()
    assert printed == ['{"lines":["one"']
    found = json.loads(printed[0] + shown.out)
    assert (found["lines"], found["error"]["code"]) == (["one", "two"], code)
    assert status == getattr(error, "exit_code")  # noqa: B009 - both kinds have one
    assert shown.err == ""


def test_a_log_without_lines_is_a_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    """The document is an empty list, not an empty output."""
    assert document(capsys, FakeHost(logs=[]), "logs", "vm") == {"lines": []}
