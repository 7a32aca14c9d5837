"""Where the data directory is, whoever asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.errors import HostCannot
from coppice.store import layout


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is not root, and whom no variable tells anything."""
    for variable in ("COPPICE_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 4711)


def test_the_variables_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """COPPICE_HOME before XDG_DATA_HOME before HOME."""
    monkeypatch.setenv("HOME", "/home/of")
    assert layout.default_home() == Path("/home/of/.local/share/coppice")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert layout.default_home() == Path("/data/coppice")
    monkeypatch.setenv("COPPICE_HOME", "/chosen")
    assert layout.default_home() == Path("/chosen")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers are run under user ids that no list of users has: that is no internal error."""
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    with pytest.raises(HostCannot) as refused:
        layout.default_home()
    assert "COPPICE_HOME" in (refused.value.hint or "")
