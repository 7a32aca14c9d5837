"""Records of snapshots. One that the journal has a row for is being made or removed, and is not found."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import msgspec

from coppice.errors import NameTaken, NotFound
from coppice.model import Snapshot
from coppice.ownership import no_snapshot
from coppice.store.database import Database
from coppice.store.volumes import require_attachable

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Snapshot).decode
_WHOLE = "id NOT IN (SELECT instance FROM journal)"


class SnapshotStore:
    """All blocking; see `Database`. `journal` writes the row of an operation into an open transaction."""

    def __init__(self, database: Database, journal: Callable[[sqlite3.Connection, str, str], None]) -> None:
        self._db = database
        self._journal = journal

    def create(self, snapshot: Snapshot, operation: str) -> None:
        """Record a snapshot that is about to be made.

        :raises NameTaken: another snapshot has the name
        :raises InUse: it cannot have its volumes
        """
        with self._db.write() as connection:
            require_attachable(connection, [snapshot.machine.volumes])
            try:
                connection.execute(
                    "INSERT INTO snapshots (id, name, source, image, created_at, record) VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        snapshot.id, snapshot.name, snapshot.source, snapshot.image, snapshot.created_at, _encode(snapshot),
                    ),
                )  # fmt: skip
            except sqlite3.IntegrityError as error:
                raise NameTaken(
                    f"the name {snapshot.name!r} is taken by another snapshot",
                    hint="choose another, or remove its holder with `coppice snapshot rm`",
                ) from error
            self._journal(connection, snapshot.id, operation)

    def finish(self, snapshot: Snapshot) -> None:
        """Write the record of a snapshot that is whole, and end the operation that made it.

        :raises NotFound: it is gone
        """
        with self._db.write() as connection:
            cursor = connection.execute(
                "UPDATE snapshots SET record = ? WHERE id = ?", (_encode(snapshot), snapshot.id)
            )
            if cursor.rowcount == 0:
                raise NotFound(f"the snapshot {snapshot.name!r} is gone", hint="another process removed it")
            connection.execute("DELETE FROM journal WHERE instance = ?", (snapshot.id,))

    def begin(self, snapshot: Snapshot, operation: str) -> None:
        """Record that an operation starts on this snapshot."""
        with self._db.write() as connection:
            self._journal(connection, snapshot.id, operation)

    def get(self, reference: str) -> Snapshot:
        """The snapshot with this id or name.

        :raises NotFound: there is none
        """
        with self._db.read() as connection:
            row = connection.execute(
                f"SELECT record FROM snapshots WHERE (id = ?1 OR name = ?1) AND {_WHOLE} ORDER BY id = ?1 DESC",  # noqa: S608 - a constant
                (reference,),
            ).fetchone()
        if row is None:
            raise no_snapshot(reference)
        return _decode(row[0])

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute(
                f"SELECT record FROM snapshots WHERE {_WHOLE} ORDER BY created_at, rowid"  # noqa: S608 - a constant
            ).fetchall()
        return [_decode(row[0]) for row in rows]

    def ids(self) -> set[str]:
        """Ids of all snapshots, also of those that are being made or removed."""
        with self._db.read() as connection:
            return {row[0] for row in connection.execute("SELECT id FROM snapshots").fetchall()}

    def record_sha256(self, snapshot_id: str, *, memory: str | None = None, disk: str | None = None) -> bool:
        """Record hashes of a snapshot's files, unless they are recorded already; tell whether the snapshot is still there."""
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM snapshots WHERE id = ?", (snapshot_id,)).fetchone()
            if row is None:
                return False
            snapshot = _decode(row[0])
            mem_file = snapshot.mem_file
            if mem_file is not None:
                mem_file = msgspec.structs.replace(mem_file, sha256=mem_file.sha256 or memory)
            changed = msgspec.structs.replace(snapshot, mem_file=mem_file, disk_sha256=snapshot.disk_sha256 or disk)
            connection.execute("UPDATE snapshots SET record = ? WHERE id = ?", (_encode(changed), snapshot_id))
            return True

    def forget(self, snapshot_id: str) -> None:
        """Remove the record and the journal row of a snapshot whose directory is gone. Idempotent."""
        with self._db.write() as connection:
            connection.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))
            connection.execute("DELETE FROM journal WHERE instance = ?", (snapshot_id,))
