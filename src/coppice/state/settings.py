"""config.toml of a data directory: its tables and their keys.

[hashing]
background = true             # COPPICE_HASHING=on|off
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from coppice.errors import CoppiceError, UsageError
from coppice.names import parse_size

BUDGET_VARIABLES = {
    "max_instances": "COPPICE_MAX_INSTANCES",
    "memory": "COPPICE_MEMORY_BUDGET",
    "memory_overcommit": "COPPICE_MEMORY_OVERCOMMIT",
    "disk_floor": "COPPICE_DISK_FLOOR",
}
_KEYS: dict[str, tuple[str, ...]] = {"budgets": tuple(BUDGET_VARIABLES), "hashing": ("background",)}
_HASHING = "COPPICE_HASHING"
_WORDS = {"on": True, "off": False}


def config_file(home: Path) -> Path:
    """Return the path of config.toml."""
    return home / "config.toml"


def read_table(home: Path, name: str) -> dict[str, object]:
    """Return one table of config.toml, empty if it is missing. Blocks.

    :raises UsageError: the file cannot be read, or any table has an unknown key
    """
    file = config_file(home)
    if not file.exists():
        return {}
    import tomllib  # imported here: most data directories have no such file

    try:
        document = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {file}: {error}", hint="correct the file, or remove it") from error
    for table, content in document.items():
        known = _KEYS.get(table)
        unknown = sorted(content.keys() - set(known)) if known and isinstance(content, dict) else [table]
        if unknown:
            raise UsageError(f"{file} has the unknown key {unknown[0]!r}", hint=f"known keys: {_known()}")
    return dict(document.get(name, {}))


def _known() -> str:
    return "; ".join(f"in [{table}] {', '.join(keys)}" for table, keys in _KEYS.items())


def hashes_in_background(home: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether captured memory is hashed in the background: by the environment, config.toml,
    or by default. Blocks.

    :raises UsageError: the value is not a known word
    """
    word = environ.get(_HASHING, "")
    if word:
        if word.lower() not in _WORDS:
            raise UsageError(f"{_HASHING} is {word!r}", hint="use on or off")
        return _WORDS[word.lower()]
    said = read_table(home, "hashing").get("background", True)
    if not isinstance(said, bool):
        raise UsageError(f"background in {config_file(home)} is {said!r}", hint="use true or false")
    return said


def asked_budgets(home: Path, environ: Mapping[str, str] = os.environ) -> dict[str, float]:
    """Return the budgets that the environment or config.toml set, by the names of their fields in
    `Budgets`. Blocks.

    :raises UsageError: one of them is invalid; the message says which
    """
    found = {key: (f"{key} in {config_file(home)}", value) for key, value in read_table(home, "budgets").items()}
    for key, variable in BUDGET_VARIABLES.items():
        if environ.get(variable):
            found[key] = (variable, environ[variable])
    return {field: read(*found[key]) for key, (field, read) in _BUDGETS.items() if key in found}


def _whole(where: str, value: object) -> int:
    return int(_number(where, value))


def _number(where: str, value: object) -> float:
    """Return the value as a number, which must be at least 1."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise UsageError(f"{where} is {value!r}", hint="give a number of at least 1")
    return number


def _size(where: str, value: object) -> int:
    try:
        return parse_size(str(value))
    except CoppiceError as error:
        raise UsageError(f"{where} is {value!r}, which is not a size", hint=error.hint) from error


_BUDGETS: dict[str, tuple[str, Callable[[str, object], float]]] = {
    "max_instances": ("max_instances", _whole),
    "memory": ("memory_bytes", _size),
    "memory_overcommit": ("memory_overcommit", _number),
    "disk_floor": ("disk_floor_bytes", _size),
}
