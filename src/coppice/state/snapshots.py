"""Records of snapshots."""

from __future__ import annotations

import msgspec

from coppice.errors import NotFound
from coppice.model import Snapshot
from coppice.model.ownership import no_snapshot
from coppice.state.journal import JournalOperation
from coppice.state.records import Records
from coppice.state.volumes import require_attachable


class SnapshotStore(Records[Snapshot]):
    """All methods block; see `Database`."""

    _noun = "snapshot"
    _decode = staticmethod(msgspec.json.Decoder(Snapshot).decode)

    def _missing(self, reference: str) -> NotFound:
        return no_snapshot(reference)

    def create(self, snapshot: Snapshot, operation: JournalOperation) -> None:
        """Record a snapshot that is about to be made.

        :raises NameTaken: another snapshot has the name
        :raises InUse: its volumes cannot be attached
        """
        with self._db.write() as connection:
            require_attachable(connection, [snapshot.machine.volumes])
            self._insert(connection, snapshot, operation, source=snapshot.source, image=snapshot.image)

    def begin(self, snapshot: Snapshot, operation: JournalOperation) -> None:
        """Record that an operation starts on this snapshot."""
        with self._db.write() as connection:
            self._journal(connection, snapshot.id, operation)

    def record_sha256(
        self, snapshot_id: str, *, memory: tuple[int, str] | None = None, disk: str | None = None
    ) -> bool:
        """Record hashes of a snapshot's files, unless they are already recorded; return whether the
        snapshot still exists.

        :param memory: inode and hash of a file of its memory
        """
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM snapshots WHERE id = ?", (snapshot_id,)).fetchone()
            if row is None:
                return False
            snapshot = self._decode(row[0])
            capture = snapshot.capture
            if capture is not None and memory is not None:
                capture = capture.with_sha256(*memory) or capture
            changed = msgspec.structs.replace(snapshot, capture=capture, disk_sha256=snapshot.disk_sha256 or disk)
            connection.execute("UPDATE snapshots SET record = ? WHERE id = ?", (self._encode(changed), snapshot_id))
            return True
