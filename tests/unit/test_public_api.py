"""The contents and the cost of `import coppice`, and generated pages that agree with them."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
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


def test_the_lazy_names_are_exactly_the_exported_ones() -> None:
    """`from coppice import *` works, and __all__, dir() and the lazy table agree."""
    for name in coppice.__all__:
        assert getattr(coppice, name) is not None
    assert set(coppice.__all__) <= set(dir(coppice))
    assert len(set(coppice.__all__)) == len(coppice.__all__)
    assert set(coppice.__all__) == {"__version__", *coppice._NAMES}


def test_every_error_and_data_type_is_exported() -> None:
    """Every error that a call can raise, and every type that it can return, can be imported from
    the package.
    """
    assert own(errors) | own(model) - {"Record"} <= set(coppice.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The lazy import behaves as a module does."""
    with pytest.raises(AttributeError, match="nonsense"):
        coppice.nonsense  # noqa: B018 - reading it is the test


def test_a_lazy_name_is_the_modules_own_object() -> None:
    """`except coppice.NotFound` catches the raised error because both are the same class."""
    assert coppice.NotFound is errors.NotFound
    assert coppice.State is model.State
    assert coppice.AsyncHost is importlib.import_module("coppice.client").AsyncHost
    assert coppice.Host is importlib.import_module("coppice.client").Host


def test_importing_the_package_imports_nothing_else() -> None:
    """`import coppice` costs nothing until a name is used."""
    program = "import sys, coppice; print([name for name in sys.modules if name.startswith(('coppice.', 'msgspec', 'asyncio'))])"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    shown = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True, timeout=30)
    assert shown.stdout == b"['coppice.lazily']\n"


def test_the_generated_pages_are_up_to_date() -> None:
    """docs/cli.md and docs/api.md equal the output of tools/generate_docs.py."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "tools" / "generate_docs.py"), "--check"]
    ended = subprocess.run(command, env=env, capture_output=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()


def test_the_generated_client_is_up_to_date() -> None:
    """The methods of handles, managers and hosts equal the output of tools/generate_client.py for
    the request records.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "tools" / "generate_client.py"), "--check"]
    ended = subprocess.run(command, env=env, capture_output=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()
