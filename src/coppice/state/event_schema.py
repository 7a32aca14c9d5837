"""The table of events. Triggers write it, in the transaction of the change itself.

So each change has its event, whichever process and statement makes it.
"""

from __future__ import annotations

import sqlite3
from typing import Final

KEPT: Final = 20_000
"""How many events are kept."""

_TABLE = """
CREATE TABLE events (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    at       REAL NOT NULL,
    kind     TEXT NOT NULL,
    instance TEXT NOT NULL,
    name     TEXT NOT NULL,
    owner    TEXT,
    state    TEXT NOT NULL,
    parent   TEXT
) STRICT
"""
_TRIGGER = """
CREATE TRIGGER events_{kind} AFTER {change} ON instances
WHEN json_extract(CAST({row}.record AS TEXT), '$.stem_of') IS NULL {condition}
BEGIN
    INSERT INTO events (at, kind, instance, name, owner, state, parent)
    VALUES (
        (julianday('now') - 2440587.5) * 86400.0, '{kind}', {row}.id, {row}.name,
        json_extract(CAST({row}.record AS TEXT), '$.owner'), {row}.state, {row}.parent
    );
    DELETE FROM events WHERE id <= last_insert_rowid() - {kept};
END
"""
_CHANGES = (
    ("made", "INSERT", "NEW", ""),
    ("state", "UPDATE OF state", "NEW", "AND NEW.state IS NOT OLD.state"),
    ("removed", "DELETE", "OLD", ""),
)


# The search for the text spares most changes of records the three extractions.
_EXITED = """
CREATE TRIGGER events_exited AFTER UPDATE OF record ON instances
WHEN instr(CAST(NEW.record AS TEXT), '"process_end":{')
    AND json_extract(CAST(NEW.record AS TEXT), '$.stem_of') IS NULL
    AND json_extract(CAST(NEW.record AS TEXT), '$.process_end') IS NOT NULL
    AND json_extract(CAST(NEW.record AS TEXT), '$.process_end')
        IS NOT json_extract(CAST(OLD.record AS TEXT), '$.process_end')
BEGIN
    INSERT INTO events (at, kind, instance, name, owner, state, parent, detail)
    VALUES (
        (julianday('now') - 2440587.5) * 86400.0, 'exited', NEW.id, NEW.name,
        json_extract(CAST(NEW.record AS TEXT), '$.owner'), NEW.state, NEW.parent,
        'status ' || json_extract(CAST(NEW.record AS TEXT), '$.process_end.exit_code')
            || coalesce(' (signal ' || json_extract(CAST(NEW.record AS TEXT), '$.process_end.signal') || ')', '')
    );
END
"""


def add_process_ends(connection: sqlite3.Connection) -> None:
    """Make the trigger for the ends of machines' processes."""
    connection.execute(_EXITED)


def add_events(connection: sqlite3.Connection) -> None:
    """Make the table and its triggers."""
    connection.execute(_TABLE)
    for kind, change, row, condition in _CHANGES:
        connection.execute(_TRIGGER.format(kind=kind, change=change, row=row, condition=condition, kept=KEPT))
