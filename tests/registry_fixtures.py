"""Fixtures of the tests that pull images: registries on loopback, a proxy, a hostile registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pulls import Hostile
from registries import Front, docker_registry, front


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty registry without logins."""
    with docker_registry(tmp_path_factory.mktemp("registry") / "open") as address:
        yield address


@pytest.fixture
def proxy(registry: str) -> Iterator[Front]:
    """A proxy before the registry."""
    with front(registry) as server:
        yield server


@pytest.fixture
def no_saved_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the logins of the tests' user out."""
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    """A registry that does what a test says."""
    with front() as server:
        yield Hostile(server)
