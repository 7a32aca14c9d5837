"""What `import coppice` gives, what it costs, and that the generated pages say the same."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import coppice
from coppice import errors, model

ROOT = Path(__file__).parents[2]


def own(module: ModuleType) -> set[str]:
    """Public classes that a module defines."""
    members = inspect.getmembers(module, inspect.isclass)
    return {name for name, kind in members if kind.__module__ == module.__name__ and not name.startswith("_")}


def test_all_names_are_there_and_no_others() -> None:
    """`from coppice import *` works, and __all__, dir() and the lazy table agree."""
    for name in coppice.__all__:
        assert getattr(coppice, name) is not None
    assert set(coppice.__all__) <= set(dir(coppice))
    assert len(set(coppice.__all__)) == len(coppice.__all__)
    assert set(coppice.__all__) == {"__version__", *coppice._HOME}


def test_every_error_and_data_type_is_exported() -> None:
    """Whatever a call can raise or return can be imported from the package."""
    assert own(errors) | own(model) - {"Record"} <= set(coppice.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy import behaves as a module does."""
    with pytest.raises(AttributeError, match="nonsense"):
        coppice.nonsense  # noqa: B018 - reading it is the test


def test_names_are_what_their_modules_call_so() -> None:
    """A lazy name is the very object, so that `except coppice.NotFound` catches what is raised."""
    assert coppice.NotFound is errors.NotFound
    assert coppice.State is model.State
    assert coppice.AsyncHost is importlib.import_module("coppice.host").AsyncHost
    assert coppice.Host is importlib.import_module("coppice.sync").Host


def test_importing_the_package_imports_nothing_else() -> None:
    """`import coppice` costs nothing until a name is used."""
    program = "import sys, coppice; print([name for name in sys.modules if name.startswith(('coppice.', 'msgspec', 'asyncio'))])"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    shown = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True, timeout=30)
    assert shown.stdout == b"[]\n"


def test_the_version_is_the_projects() -> None:
    """The package, the command line and the distribution have one version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert coppice.__version__ == project["version"]


def test_the_generated_pages_are_up_to_date() -> None:
    """docs/cli.md and docs/api.md are what tools/generate_docs.py writes now."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "tools" / "generate_docs.py"), "--check"]
    ended = subprocess.run(command, env=env, capture_output=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()
