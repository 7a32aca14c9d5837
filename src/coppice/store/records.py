"""Records of one kind in a table of their own. One that the journal has a row for is being made or removed, and is not found."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import msgspec

from coppice.errors import NameTaken, NotFound
from coppice.model import Snapshot, Volume
from coppice.store.database import Database

WHOLE = "id NOT IN (SELECT instance FROM journal)"
T = TypeVar("T", Snapshot, Volume)


class Records(ABC, Generic[T]):
    """All blocking; see `Database`. `journal` writes the row of an operation into an open transaction."""

    _noun: ClassVar[str]  # with an s, the table
    _decode: Callable[[bytes], T]  # made with its class, where one thread imports it: see `coppice.images.store`

    def __init__(self, database: Database, journal: Callable[[sqlite3.Connection, str, str], None]) -> None:
        self._db = database
        self._journal = journal
        self._encode = msgspec.json.Encoder().encode
        self._table = f"{self._noun}s"

    @abstractmethod
    def _missing(self, reference: str) -> NotFound: ...

    def get(self, reference: str) -> T:
        """The one with this id or name.

        :raises NotFound: there is none
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
        """All of them, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute(
                f"SELECT record FROM {self._table} WHERE {WHOLE} ORDER BY created_at, rowid"  # noqa: S608 - constants
            ).fetchall()
        return [self._decode(row[0]) for row in rows]

    def ids(self) -> set[str]:
        """Ids of all, also of those that are being made or removed."""
        with self._db.read() as connection:
            return {row[0] for row in connection.execute(f"SELECT id FROM {self._table}")}  # noqa: S608 - a constant

    def finish(self, record: T) -> None:
        """Write the record of what is whole, and end the operation that made it.

        :raises NotFound: it is gone
        """
        with self._db.write() as connection:
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
        """Remove the record and the journal row of what has no directory any more. Idempotent."""
        with self._db.write() as connection:
            connection.execute(f"DELETE FROM {self._table} WHERE id = ?", (record_id,))  # noqa: S608 - a constant
            connection.execute("DELETE FROM journal WHERE instance = ?", (record_id,))

    def _insert(self, connection: sqlite3.Connection, record: T, operation: str, **columns: str) -> None:
        """Record what is about to be made by an operation.

        :raises NameTaken: another has the name
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
