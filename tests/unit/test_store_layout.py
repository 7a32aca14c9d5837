"""The data directory's location for every user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coppice.client import AsyncHost
from coppice.errors import HostCannot, UsageError
from coppice.state import layout


@pytest.fixture(autouse=True)
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Become a user other than root, with no variable set."""
    for variable in ("COPPICE_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 4711)


def test_the_order_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """COPPICE_HOME takes precedence over XDG_DATA_HOME, and that over HOME."""
    monkeypatch.setenv("HOME", "/home/of")
    assert layout.data_directory() == Path("/home/of/.local/share/coppice")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert layout.data_directory() == Path("/data/coppice")
    monkeypatch.setenv("COPPICE_HOME", "/chosen")
    assert layout.data_directory() == Path("/chosen")


def test_a_user_without_a_home_gets_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers may run under user ids without an account: the error is not an internal one, and
    names the variable to set.
    """
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    with pytest.raises(HostCannot) as refused:
        layout.data_directory()
    assert "COPPICE_HOME" in (refused.value.hint or "")


@pytest.mark.parametrize("place", ["given", "variable", "working directory"])
def test_a_path_that_is_not_utf8_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    """SQLite would refuse it with a message about a column, after half of the directory was made."""
    path = tmp_path / os.fsdecode(b"d\xff")
    match place:
        case "variable":
            monkeypatch.setenv("COPPICE_HOME", str(path))
        case "working directory":
            path.mkdir()
            monkeypatch.chdir(path)
    given = {"given": path, "variable": None, "working directory": "here"}[place]
    with pytest.raises(UsageError, match="data directory is not UTF-8"):
        AsyncHost(given)
