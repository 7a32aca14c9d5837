"""Networks for bursts of forks: namespaces with a TAP, NAT and a packet filter, made in advance.

guest -- tap0 [slot: namespace, filter, NAT] wan -- veth [this host: NAT, published ports] -- world
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

RUNTIME: Final = Path("/run/coppice")  # the pools of all data directories; a reboot removes them and their slots


def key_of(home: Path) -> str:
    """Return the key that the names of a data directory's links, namespaces and tables contain."""
    return hashlib.sha256(bytes(home.resolve())).hexdigest()[:6]


def rows(pool: Path, directory: str) -> list[str]:
    """Return the names in one directory of a pool, empty if there is none. Blocks."""
    try:
        return os.listdir(pool / directory)  # noqa: PTH208 - on the path of each fork
    except FileNotFoundError:
        return []


def is_wanted(database: Path, but: str | None = None) -> bool:
    """Return whether a snapshot, or an instance other than `but`, has this network: then free slots
    are kept. Blocks.
    """
    if not database.exists():
        return False
    query = " UNION ALL ".join(
        f"SELECT id FROM {table} WHERE json_extract(CAST(record AS TEXT), '$.machine.network') = 'nat'"  # noqa: S608
        for table in ("instances", "snapshots")
    )
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        return any(row[0] != but for row in connection.execute(query))
