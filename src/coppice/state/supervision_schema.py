"""The schema of what the supervisor searches and records."""

from __future__ import annotations

import sqlite3
from typing import Final

# `supervised` and `expires_at` are generated from the record: the parts of it that are searched.
_CHANGES: Final = (
    """
    ALTER TABLE instances ADD COLUMN supervised INTEGER GENERATED ALWAYS AS (
        json_extract(CAST(record AS TEXT), '$.supervision') IS NOT NULL
        AND json_extract(CAST(record AS TEXT), '$.stem_of') IS NULL
    ) VIRTUAL
    """,
    """
    ALTER TABLE instances ADD COLUMN expires_at REAL GENERATED ALWAYS AS (
        json_extract(CAST(record AS TEXT), '$.supervision.expires_at')
    ) VIRTUAL
    """,
    "CREATE INDEX instances_supervised ON instances (supervised) WHERE supervised",
    "CREATE INDEX instances_expires_at ON instances (expires_at) WHERE expires_at IS NOT NULL",
    "ALTER TABLE events ADD COLUMN detail TEXT NOT NULL DEFAULT ''",
    """
    CREATE TRIGGER events_policies AFTER UPDATE OF record ON instances
    WHEN json_extract(CAST(NEW.record AS TEXT), '$.stem_of') IS NULL
        AND json_extract(CAST(NEW.record AS TEXT), '$.supervision')
            IS NOT json_extract(CAST(OLD.record AS TEXT), '$.supervision')
    BEGIN
        INSERT INTO events (at, kind, instance, name, owner, state, parent)
        VALUES (
            (julianday('now') - 2440587.5) * 86400.0, 'policies', NEW.id, NEW.name,
            json_extract(CAST(NEW.record AS TEXT), '$.owner'), NEW.state, NEW.parent
        );
    END
    """,
    # What was observed of an instance is no part of its record: the supervisor writes it without
    # the instance's lock.
    "CREATE TABLE observations (instance TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT",
    """
    CREATE TRIGGER observations_removed AFTER DELETE ON instances
    BEGIN
        DELETE FROM observations WHERE instance = OLD.id;
    END
    """,
)


_SCHEDULES: Final = (
    # A row outlives its instance as long as snapshots wait for their age. `due` is when to look at
    # it next, and `longest` the longest time until then: a later `due` is of a clock that was set back.
    """
    CREATE TABLE schedules (
        instance TEXT PRIMARY KEY, due REAL NOT NULL, longest REAL NOT NULL, record BLOB NOT NULL
    ) STRICT
    """,
    "ALTER TABLE observations ADD COLUMN held_at REAL",
    "ALTER TABLE observations ADD COLUMN hold_until REAL",
)


def add_schedules(connection: sqlite3.Connection) -> None:
    """Make the table of snapshot schedules, and the columns for holds of automatic standbys."""
    for statement in _SCHEDULES:
        connection.execute(statement)


def add_supervision(connection: sqlite3.Connection) -> None:
    """Make the columns, the table and the triggers."""
    for statement in _CHANGES:
        connection.execute(statement)
