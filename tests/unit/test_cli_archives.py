"""export and import: their requests to the host, files or pipes, and their output."""

from __future__ import annotations

import io
import sys

import pytest

from cli_host import FakeHost, instance
from cli_lines import document, output_of, run
from coppice.model import MIB, State


def test_a_template_is_exported_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The file is named after the template unless one is given."""
    host = FakeHost(export=3 * MIB)
    assert output_of(capsys, host, "export", "oak") == "oak.coppice has 3.0 MiB\n"
    assert host.asked("export") == {"instance": "oak", "bare": False, "path": "oak.coppice"}
    assert document(capsys, host, "export", "oak", "-o", "a", "--bare") == {"path": "a", "bytes": 3 * MIB}


def test_a_template_is_exported_to_a_pipe(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """The archive is all of the output, and has no JSON form."""
    host = FakeHost(open_export=[b"\0\xff", b"bark"])
    assert run(host, "export", "oak", "-o", "-") == 0
    assert capsysbinary.readouterr().out == b"\0\xffbark"
    assert run(host, "--json", "export", "oak", "-o", "-") == 2
    assert b"cannot be written to JSON" in capsysbinary.readouterr().out


def test_an_archive_is_imported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file or from standard input, but not from a terminal."""
    host = FakeHost(import_template=instance("oak", State.TEMPLATE))
    assert output_of(capsys, host, "import", "oak.coppice") == "oak is Template\n"
    assert host.asked("import_template") == {"name": None, "path": "oak.coppice"}
    host = FakeHost(import_template=instance("elm", State.TEMPLATE))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert document(capsys, host, "import", "-", "--name", "elm")["state"] == "Template"
    assert host.asked("import_template") == {"name": "elm", "path": "/dev/stdin"}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert run(host, "import") == 2
    assert "cannot be read from a terminal" in capsys.readouterr().err
