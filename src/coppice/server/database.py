"""`server.db`: what a server records for itself.

The file belongs to servers alone. Losing it loses no machine. So it has its own schema version, and
its writes do not delay those of `coppice.db`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from coppice.state.database import Database
from coppice.state.migrations import Migration

DATABASE: Final = "server.db"

_MIGRATIONS: Final[tuple[Migration, ...]] = (
    """
    CREATE TABLE keys (
        owner     TEXT NOT NULL,
        key       TEXT NOT NULL,
        operation TEXT NOT NULL,
        digest    TEXT NOT NULL,
        generated BLOB NOT NULL,
        begun_at  REAL NOT NULL,
        pid       INTEGER NOT NULL,
        ticks     INTEGER NOT NULL,
        status    TEXT NOT NULL,
        outcome   BLOB,
        PRIMARY KEY (owner, key)
    ) STRICT;
    CREATE INDEX keys_begun ON keys (begun_at)
    """,
    """
    CREATE TABLE audit (
        number INTEGER PRIMARY KEY,
        id     TEXT NOT NULL UNIQUE,
        owner  TEXT NOT NULL,
        entry  BLOB NOT NULL
    ) STRICT;
    CREATE INDEX audit_owner ON audit (owner, number)
    """,
    "ALTER TABLE keys ADD COLUMN content TEXT",  # SHA-256 of a body that is no part of the request
)


def open_database(home: Path) -> Database:
    """Open the database of a data directory. Blocks."""
    return Database(home / DATABASE, _MIGRATIONS)
