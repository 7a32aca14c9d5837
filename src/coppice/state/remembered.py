"""Results of reads of the database, which are right until any process writes to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from coppice.state.database import Database

T = TypeVar("T")
_MOST: Final = 256


class Remembered(Generic[T]):
    """The latest results of one kind of read, by key."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[tuple[int, int], T]] = {}

    def get(self, key: str, read: Callable[[sqlite3.Connection], T]) -> T:
        """Return the result of `read`. It is called only if the database has changed since the last time. Blocks."""
        with self._database.read() as connection:
            version = _version(connection)  # before the read: a later change makes the result old
            known = self._known.get(key)
            if known is None or known[0] != version:
                known = version, read(connection)
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = known
            return known[1]

    def at_once(self, key: str) -> T | None:
        """Return the latest result if it is still right. None if the database has changed, or another thread
        is using it.

        This waits for no other thread and no disk, so an event loop may call it. A thread would cost it
        several times the work.
        """
        if (known := self._known.get(key)) is None:
            return None
        with self._database.read_at_once() as connection:
            return known[1] if connection is not None and _version(connection) == known[0] else None


def _version(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return a value that changes with each commit of another connection, and each change of this one."""
    return connection.execute("PRAGMA data_version").fetchone()[0], connection.total_changes
