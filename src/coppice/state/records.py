"""Records of one kind in their own table.

A record with a journal row is being made or removed, and lookups skip it.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import msgspec

from coppice.completion import QuickCalls
from coppice.errors import NameTaken, NotFound
from coppice.model import Snapshot, Volume
from coppice.state.database import Database
from coppice.state.journal import JournalOperation

WHOLE = "id NOT IN (SELECT instance FROM journal)"
T = TypeVar("T", Snapshot, Volume)


class Records(QuickCalls, ABC, Generic[T]):
    """All methods block; see `Database`.

    `journal` writes the row of an operation into an open transaction.
    """

    _noun: ClassVar[str]  # the table's name is this plus an s
    _decode: Callable[[bytes], T]  # made with its class, at import: see `coppice.state.images`

    def __init__(
        self, database: Database, journal: Callable[[sqlite3.Connection, str, JournalOperation], None]
    ) -> None:
        self._db = database
        self._journal = journal
        self._encode = msgspec.json.Encoder().encode
        self._table = f"{self._noun}s"

    @abstractmethod
    def _missing(self, reference: str) -> NotFound: ...

    def get(self, reference: str) -> T:
        """Return the record with this id or name.

        :raises NotFound: there is no such record
        """
        with self._db.read() as connection:
            row = connection.execute(
                f"SELECT record FROM {self._table} WHERE (id = ?1 OR name = ?1) AND {WHOLE} ORDER BY id = ?1 DESC",  # noqa: S608 - constants
                (reference,),
            ).fetchone()
        if row is None:
            raise self._missing(reference)
        return self._decode(row[0])

    def all(self) -> list[T]:
        """Return all records, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute(
                f"SELECT record FROM {self._table} WHERE {WHOLE} ORDER BY created_at, rowid"  # noqa: S608 - constants
            ).fetchall()
        return [self._decode(row[0]) for row in rows]

    def ids(self) -> set[str]:
        """Return all ids, including those of records that are being made or removed."""
        with self._db.read() as connection:
            return {row[0] for row in connection.execute(f"SELECT id FROM {self._table}")}  # noqa: S608 - a constant

    def finish(self, record: T) -> None:
        """Write the finished record and end the operation that made it. Both are on disk on return.

        :raises NotFound: it was removed meanwhile
        """
        with self._db.write(durable=True) as connection:
            cursor = connection.execute(
                f"UPDATE {self._table} SET record = ? WHERE id = ?",  # noqa: S608 - a constant
                (self._encode(record), record.id),
            )
            if cursor.rowcount == 0:
                raise NotFound(
                    f"the {self._noun} {record.name!r} is gone",
                    hint=f"another process removed it: see `coppice {self._noun} ls`",
                )
            connection.execute("DELETE FROM journal WHERE instance = ?", (record.id,))

    def forget(self, record_id: str) -> None:
        """Remove the record and the journal row of an object whose directory is gone.

        Idempotent.
        """
        with self._db.write() as connection:
            connection.execute(f"DELETE FROM {self._table} WHERE id = ?", (record_id,))  # noqa: S608 - a constant
            connection.execute("DELETE FROM journal WHERE instance = ?", (record_id,))

    def _insert(self, connection: sqlite3.Connection, record: T, operation: JournalOperation, **columns: str) -> None:
        """Insert a record that an operation is about to make.

        :raises NameTaken: another record has the name
        """
        row = {"id": record.id, "name": record.name, "created_at": record.created_at, "record": self._encode(record)}
        row |= columns
        try:
            connection.execute(
                f"INSERT INTO {self._table} ({', '.join(row)}) VALUES (:{', :'.join(row)})",  # noqa: S608 - constants
                row,
            )
        except sqlite3.IntegrityError as error:
            raise NameTaken(
                f"the name {record.name!r} is taken by another {self._noun}",
                hint=f"choose another, or remove its holder with `coppice {self._noun} rm`",
            ) from error
        self._journal(connection, record.id, operation)
