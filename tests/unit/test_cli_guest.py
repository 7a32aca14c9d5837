"""cp and logs: what they ask of the host, and what comes through."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from cli_host import FakeHost
from cli_lines import document, output_of, run
from coppice.model import MIB, Progress, ProgressSink


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["cp", "vm:/etc/x", "here"], ("cp_out", ("vm", "/etc/x", Path("here")))),
        (["cp", "here", "vm:/tmp/"], ("cp_in", ("vm", Path("here"), "/tmp/"))),
    ],
)
def test_cp_goes_the_way_it_was_written(
    words: list[str], call: tuple[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The instance's side decides the direction."""
    host = FakeHost(cp_in=2 * MIB, cp_out=2 * MIB)
    assert output_of(capsys, host, *words) == "2.0 MiB copied\n"
    assert [(name, args) for name, args, _ in host.calls] == [call]
    assert document(capsys, host, *words) == {"bytes": 2 * MIB}


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("way", [["vm:/x", "here"], ["here", "vm:/x"]])
@pytest.mark.parametrize("json_", [False, True])
def test_cp_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, way: list[str], json_: bool) -> None:
    """On a terminal, and not where a program reads."""

    def copy(*_: object, progress: ProgressSink) -> int:
        progress(Progress(stage="copy", done=MIB, total=2 * MIB, unit="bytes"))
        return 2 * MIB

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert run(FakeHost(cp_in=copy, cp_out=copy), *(["--json"] if json_ else []), "cp", *way) == 0
    assert ("1.0 MiB of 2.0 MiB" in terminal.getvalue()) is not json_
    assert terminal.getvalue() == "" or not json_


def test_logs_are_passed_through(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Into a pipe a log goes byte for byte; as JSON it is text."""
    host = FakeHost(logs=[b"a\xff\x1b[2J\r", b""])
    assert run(host, "logs", "vm", "-n", "5", "--vmm") == 0
    assert capsysbinary.readouterr().out == b"a\xff\x1b[2J\r\n\n"
    assert host.asked("logs") == {"0": "vm", "source": "vmm", "tail": 5, "follow": False}
    assert run(host, "--json", "logs", "vm") == 0
    assert json.loads(capsysbinary.readouterr().out) == {"lines": ["a�\x1b[2J\r", ""]}
