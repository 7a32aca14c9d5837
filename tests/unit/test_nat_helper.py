"""Processes that the provider `nat` leaves behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from coppice.network.nat.helper import start_helper


def test_no_module_of_the_current_directory_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`coppice fork` by root in another user's directory must not run that user's files."""
    (tmp_path / "planted.py").write_text("open('was_run', 'w')")
    monkeypatch.chdir(tmp_path)
    start_helper("planted", [], [], tmp_path / "log")
    for waiting in threading.enumerate():
        if waiting.name == "planted":  # until the process has ended
            waiting.join(60)
    assert "No module named planted" in (tmp_path / "log").read_text()
    assert not (tmp_path / "was_run").exists()
