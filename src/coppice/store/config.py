"""config.toml of a data directory: its tables, and the keys that they may have.

[hashing]
background = true             # COPPICE_HASHING=on|off
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from coppice.errors import UsageError

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
    """Where it is."""
    return home / "config.toml"


def read_table(home: Path, name: str) -> dict[str, object]:
    """One table of config.toml; empty where there is none. Blocks.

    :raises UsageError: the file cannot be read, or says in any table what means nothing
    """
    file = config_file(home)
    try:
        document = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}", hint="correct it, or remove it") from error
    for table, content in document.items():
        known = _KEYS.get(table)
        unknown = sorted(content.keys() - set(known)) if known and isinstance(content, dict) else [table]
        if unknown:
            raise UsageError(f"{file} says {unknown[0]!r}, which means nothing", hint=f"it can have {_known()}")
    return dict(document.get(name, {}))


def _known() -> str:
    return "; ".join(f"in [{table}] {', '.join(keys)}" for table, keys in _KEYS.items())


def hashes_in_background(home: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what was captured is hashed without being asked for: the environment's word, else config.toml's, else yes. Blocks.

    :raises UsageError: the word cannot be understood
    """
    word = environ.get(_HASHING, "")
    if word:
        if word.lower() not in _WORDS:
            raise UsageError(f"{_HASHING} is {word!r}", hint="say on or off")
        return _WORDS[word.lower()]
    said = read_table(home, "hashing").get("background", True)
    if not isinstance(said, bool):
        raise UsageError(f"background in {config_file(home)} is {said!r}", hint="say true or false")
    return said
