"""Command lines over a test's host, run in this process: their status, their output for people, and
their JSON document.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli_host import FakeHost
from coppice.cli import main


def run(host: FakeHost, *words: str) -> int:
    """Return the exit status of a command line over that host."""
    return main(words, host_factory=host.factory)


def output_of(capsys: pytest.CaptureFixture[str], host: FakeHost, *words: str) -> str:
    """Return the output of a command, which must succeed."""
    assert run(host, *words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def document(capsys: pytest.CaptureFixture[str], host: FakeHost, *words: str, status: int = 0) -> Any:
    """Return the one JSON document that a command prints; it must print nothing else."""
    assert run(host, "--json", *words) == status
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    return json.loads(shown.out)
