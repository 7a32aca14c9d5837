"""Records of instances, their lineage, and the journal of operations under way.

The journal has at most one row per instance, snapshot or volume: the operation that is changing it, and the process that does. The row is committed before the
first side effect and removed in the same transaction that commits the outcome. A row whose process is dead is what recovery works on.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from coppice.errors import InUse, NameTaken, NotFound
from coppice.model import Instance, Record, State
from coppice.ownership import no_instance
from coppice.store.addresses import with_addresses
from coppice.store.database import Database
from coppice.store.snapshots import SnapshotStore
from coppice.store.volumes import VolumeStore, require_attachable

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Instance).decode


class JournalEntry(Record, frozen=True, kw_only=True):
    """An operation under way, or one that was interrupted."""

    instance: str
    operation: str
    owner_pid: int
    owner_ticks: int
    started_at: float


class Load(Record, frozen=True, kw_only=True):
    """What is recorded, counted."""

    instances: int
    running: int  # that have a VMM, or are being made or started
    ram_bytes: int  # of those


# A record that is new counts as running: what is being made is mostly to run, and too much is safer than too little.
LOAD = """
    SELECT count(*), coalesce(sum(runs), 0),
           coalesce(sum(CASE WHEN runs THEN json_extract(CAST(record AS TEXT), '$.machine.memory_bytes') END), 0)
    FROM (SELECT record, state NOT IN ('Stopped', 'Standby', 'Template')
                 OR id IN (SELECT instance FROM journal WHERE operation IN ('start', 'restore')) AS runs FROM instances)
"""


class Store:
    """All blocking; see `Database`."""

    def __init__(self, path: Path, owner: tuple[int, int]) -> None:
        """`owner` is the pid and start ticks that the journal names for operations of this process."""
        self._db = Database(path)
        self._owner = owner
        self.snapshots = SnapshotStore(self._db, self._journal)
        self.volumes = VolumeStore(self._db, self._journal)

    def close(self) -> None:
        """Close the database. Idempotent."""
        self._db.close()

    def sync(self) -> None:
        """Make all commits so far survive a power cut."""
        self._db.sync()

    # Instances

    def get(self, reference: str) -> Instance:
        """The instance with this id or name.

        :raises NotFound: there is none
        """
        with self._db.read() as connection:
            row = connection.execute(
                "SELECT record FROM instances WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC", (reference,)
            ).fetchone()
        if row is None:
            raise no_instance(reference)
        return _decode(row[0])

    def instances(self) -> list[Instance]:
        """All instances, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute("SELECT record FROM instances ORDER BY created_at, rowid").fetchall()
        return [_decode(row[0]) for row in rows]

    def ids(self) -> set[str]:
        """Ids of all instances."""
        with self._db.read() as connection:
            return {row[0] for row in connection.execute("SELECT id FROM instances").fetchall()}

    def known(self) -> set[str]:
        """Ids of all that has a record: instances, snapshots, volumes."""
        return self.ids() | self.snapshots.ids() | self.volumes.ids()

    def children(self, instance_id: str) -> list[Instance]:
        """Living instances that were forked from this one: the fork count is their number."""
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT record FROM instances WHERE parent = ? ORDER BY created_at, rowid", (instance_id,)
            ).fetchall()
        return [_decode(row[0]) for row in rows]

    def load(self) -> Load:
        """How much there is and runs; inside of a transaction's check, as of that transaction."""
        with self._db.read() as connection:
            instances, running, ram_bytes = connection.execute(LOAD).fetchone()
        return Load(instances=instances, running=running, ram_bytes=ram_bytes)

    def fork_counts(self) -> dict[str, int]:
        """Fork count by id, of all that have forks."""
        with self._db.read() as connection:
            return dict(
                connection.execute(
                    "SELECT parent, count(*) FROM instances WHERE parent NOT NULL GROUP BY parent"
                ).fetchall()
            )

    def users_of_image(self, digest: str) -> list[str]:
        """Names of the instances and snapshots whose root is this image."""
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT name FROM instances WHERE image = ?1 UNION SELECT name FROM snapshots WHERE image = ?1 ORDER BY name",
                (digest,),
            ).fetchall()
        return [row[0] for row in rows]

    def retire_kernel(self, key: str, retire: Callable[[], None]) -> None:
        """Call `retire` in a transaction that finds nobody who has the kernel. Who records an instance looks in its own whether the kernel is there.

        :raises InUse: instances or snapshots have it; the message names them
        """
        with self._db.write() as connection:
            users = connection.execute(
                """
                SELECT name FROM (SELECT name, record FROM instances UNION ALL SELECT name, record FROM snapshots)
                WHERE json_extract(CAST(record AS TEXT), '$.machine.kernel') = ? ORDER BY name
                """,
                (key,),
            ).fetchall()
            if users:
                raise InUse(
                    f"the kernel {key!r} is used by {', '.join(name for (name,) in users)}",
                    hint="remove them first with `coppice rm` or `coppice snapshot rm`",
                )
            retire()

    def create(
        self, instances: Iterable[Instance], operation: str, check: Callable[[], None] | None = None
    ) -> list[Instance]:
        """Record new instances and the operation that makes them, all or none; return them with the addresses that they asked for.

        `check` runs inside of the transaction.

        :raises NameTaken: a name is in use; the message says which
        :raises InUse: they cannot all have their volumes
        """
        instances = list(instances)
        with self._db.write() as connection:
            if check is not None:
                check()
            require_attachable(connection, (instance.machine.volumes for instance in instances))
            made = with_addresses(connection, instances)
            for instance in made:
                try:
                    connection.execute(
                        "INSERT INTO instances (id, name, state, parent, image, created_at, record) VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (
                            instance.id, instance.name, instance.state, instance.parent, instance.image,
                            instance.created_at, _encode(instance),
                        ),
                    )  # fmt: skip
                except sqlite3.IntegrityError as error:
                    raise _taken(instance.name) from error
                self._journal(connection, instance.id, operation)
        return made

    def require_free(self, names: Iterable[str]) -> None:
        """Look whether names are free now. Only `create` takes them: another process may be quicker.

        :raises NameTaken: one is not; the message says which
        """
        with self._db.read() as connection:
            for name in names:
                if connection.execute("SELECT 1 FROM instances WHERE name = ?", (name,)).fetchone():
                    raise _taken(name)

    def save(self, instance: Instance, *, done: bool = False) -> None:
        """Write a changed record. `done` also ends the operation that the journal has for it, in the same transaction.

        :raises NotFound: the instance is gone
        """
        with self._db.write() as connection:
            cursor = connection.execute(
                "UPDATE instances SET name = ?, state = ?, parent = ?, record = ? WHERE id = ?",
                (instance.name, instance.state, instance.parent, _encode(instance), instance.id),
            )
            if cursor.rowcount == 0:
                raise NotFound(
                    f"the instance {instance.name!r} is gone", hint="another process removed it: see `coppice ls`"
                )
            if done:
                connection.execute("DELETE FROM journal WHERE instance = ?", (instance.id,))

    def record_sha256(self, instance_id: str, inode: int, sha256: str) -> bool:
        """Record the hash of an instance's mem-file, unless it has another file or a hash by now; tell whether it was. The caller holds the instance."""
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM instances WHERE id = ?", (instance_id,)).fetchone()
            instance = _decode(row[0]) if row else None
            if instance is None or instance.mem_file is None or instance.mem_file.inode != inode:
                return False
            if instance.mem_file.sha256 is not None:
                return False
            mem_file = msgspec.structs.replace(instance.mem_file, sha256=sha256)
            changed = _encode(msgspec.structs.replace(instance, mem_file=mem_file))
            connection.execute("UPDATE instances SET record = ? WHERE id = ?", (changed, instance_id))
            return True

    def promote(self, instance: Instance, state: State, *, public: bool = False) -> Instance:
        """Change between Standby and Template, and whether the template is public.

        :raises InUse: it is to become Standby while it has forks; the message names them
        """
        changed = msgspec.structs.replace(instance, state=state, public=public and state is State.TEMPLATE)
        with self._db.write() as connection:
            if state is State.STANDBY:
                _refuse_with_forks(connection, instance, "demoted")
            connection.execute(
                "UPDATE instances SET state = ?, record = ? WHERE id = ?", (state, _encode(changed), instance.id)
            )
        return changed

    # Journal

    def begin(self, instance: Instance, operation: str, check: Callable[[], None] | None = None) -> None:
        """Record that an operation starts on this instance, together with the record as given. `check` runs inside of the transaction.

        :raises InUse: the operation is a removal and the instance is a template with forks
        """
        with self._db.write() as connection:
            if check is not None:
                check()
            if operation == "rm" and instance.state is State.TEMPLATE:
                _refuse_with_forks(connection, instance, "removed")
            self._journal(connection, instance.id, operation)
            connection.execute(
                "UPDATE instances SET state = ?, record = ? WHERE id = ?",
                (instance.state, _encode(instance), instance.id),
            )

    def finish(self, instances: Iterable[Instance], operation: str) -> None:
        """End an operation for all of these instances at once, where it still is the one that the journal has."""
        with self._db.write() as connection:
            connection.executemany(
                "DELETE FROM journal WHERE instance = ? AND operation = ?",
                [(instance.id, operation) for instance in instances],
            )

    def begin_removal(self, instances: Iterable[Instance]) -> None:
        """Record that instances are to be removed, whatever they are now; those that are not there are left out."""
        with self._db.write() as connection:
            for instance in instances:
                if connection.execute("SELECT 1 FROM instances WHERE id = ?", (instance.id,)).fetchone():
                    self._journal(connection, instance.id, "rm")

    def forget(self, instance_id: str) -> None:
        """Remove the record and the journal row of an instance whose directory is gone. Idempotent."""
        with self._db.write() as connection:
            connection.execute("DELETE FROM instances WHERE id = ?", (instance_id,))
            connection.execute("DELETE FROM journal WHERE instance = ?", (instance_id,))

    def journal(self) -> list[JournalEntry]:
        """All operations under way or interrupted."""
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT instance, operation, owner_pid, owner_ticks, started_at FROM journal"
            ).fetchall()
        return [
            JournalEntry(instance=row[0], operation=row[1], owner_pid=row[2], owner_ticks=row[3], started_at=row[4])
            for row in rows
        ]

    def journal_entry(self, instance_id: str) -> JournalEntry | None:
        """The operation under way on an instance, or the one that was interrupted; None where there is none."""
        return next((entry for entry in self.journal() if entry.instance == instance_id), None)

    def is_at(self, instance_id: str, operation: str) -> bool:
        """Whether that operation is under way on an instance, or was interrupted."""
        entry = self.journal_entry(instance_id)
        return entry is not None and entry.operation == operation

    def _journal(self, connection: sqlite3.Connection, instance_id: str, operation: str) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO journal (instance, operation, owner_pid, owner_ticks, started_at) VALUES (?, ?, ?, ?, ?)",
            (instance_id, operation, *self._owner, time.time()),
        )


def _taken(name: str) -> NameTaken:
    return NameTaken(f"the name {name!r} is taken", hint="choose another, or remove its holder with `coppice rm`")


def _refuse_with_forks(connection: sqlite3.Connection, instance: Instance, verb: str) -> None:
    names = [
        row[0]
        for row in connection.execute("SELECT name FROM instances WHERE parent = ? ORDER BY name", (instance.id,))
    ]
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise InUse(
            f"{instance.name} cannot be {verb}: it has {len(names)} fork{'s' if len(names) > 1 else ''} ({shown})",
            hint="remove them first with `coppice rm`",
        )
