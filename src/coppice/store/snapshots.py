"""Records of snapshots."""

from __future__ import annotations

import msgspec

from coppice.errors import NotFound
from coppice.model import Snapshot
from coppice.ownership import no_snapshot
from coppice.store.records import Records
from coppice.store.volumes import require_attachable


class SnapshotStore(Records[Snapshot]):
    """All blocking; see `Database`."""

    _noun = "snapshot"
    _decode = staticmethod(msgspec.json.Decoder(Snapshot).decode)

    def _missing(self, reference: str) -> NotFound:
        return no_snapshot(reference)

    def create(self, snapshot: Snapshot, operation: str) -> None:
        """Record a snapshot that is about to be made.

        :raises NameTaken: another snapshot has the name
        :raises InUse: it cannot have its volumes
        """
        with self._db.write() as connection:
            require_attachable(connection, [snapshot.machine.volumes])
            self._insert(connection, snapshot, operation, source=snapshot.source, image=snapshot.image)

    def begin(self, snapshot: Snapshot, operation: str) -> None:
        """Record that an operation starts on this snapshot."""
        with self._db.write() as connection:
            self._journal(connection, snapshot.id, operation)

    def record_sha256(self, snapshot_id: str, *, memory: str | None = None, disk: str | None = None) -> bool:
        """Record hashes of a snapshot's files, unless they are recorded already; tell whether the snapshot is still there."""
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM snapshots WHERE id = ?", (snapshot_id,)).fetchone()
            if row is None:
                return False
            snapshot = self._decode(row[0])
            mem_file = snapshot.mem_file
            if mem_file is not None:
                mem_file = msgspec.structs.replace(mem_file, sha256=mem_file.sha256 or memory)
            changed = msgspec.structs.replace(snapshot, mem_file=mem_file, disk_sha256=snapshot.disk_sha256 or disk)
            connection.execute("UPDATE snapshots SET record = ? WHERE id = ?", (self._encode(changed), snapshot_id))
            return True
