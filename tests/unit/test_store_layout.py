"""The data directory's location for every user."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.errors import HostCannot
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
    assert layout.default_home() == Path("/home/of/.local/share/coppice")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert layout.default_home() == Path("/data/coppice")
    monkeypatch.setenv("COPPICE_HOME", "/chosen")
    assert layout.default_home() == Path("/chosen")


def test_a_user_without_a_home_gets_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers may run under user ids without an account: the error is not an internal one, and
    names the variable to set.
    """
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    with pytest.raises(HostCannot) as refused:
        layout.default_home()
    assert "COPPICE_HOME" in (refused.value.hint or "")
