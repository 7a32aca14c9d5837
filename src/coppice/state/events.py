"""The log of events, which all processes write and read."""

from __future__ import annotations

import time

from coppice.completion import QuickCalls
from coppice.model import State
from coppice.model.events import Event
from coppice.state.database import Database

_PAGE = 1000


class EventLog(QuickCalls):
    """All methods block; see `Database`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def newest(self) -> int:
        """Return the id of the newest event that there ever was; 0: there was none."""
        with self._db.read() as connection:
            row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        return int(row[0]) if row else 0

    def after(self, event_id: int, owner: str | None) -> tuple[list[Event], int]:
        """Return the next events of an owner, at most a page, and the id after which to go on.

        The operator gets those of all owners. The first event is `lost` if events after `event_id`
        are no longer kept.
        """
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT id, at, kind, instance, name, owner, state, parent, detail FROM events WHERE id > ? ORDER BY id LIMIT ?",
                (event_id, _PAGE),
            ).fetchall()
        events = [
            Event(
                id=row[0], at=row[1], kind=row[2], instance=row[3], name=row[4], owner=row[5], state=State(row[6]),
                parent=row[7], detail=row[8],
            )
            for row in rows
            if owner is None or row[5] == owner
        ]  # fmt: skip
        last = rows[-1][0] if rows else event_id
        if rows and rows[0][0] > event_id + 1:
            events.insert(0, Event(id=rows[0][0] - 1, at=time.time(), kind="lost"))
        return events, last
