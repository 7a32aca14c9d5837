"""Records of instances, their lineage, and the journal of operations under way.

The journal has at most one row per instance, snapshot or volume: the operation that is changing it,
and its process. The row is committed before the first side effect, and removed in the transaction
that commits the outcome. Recovery resolves the rows of dead processes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from coppice.completion import QuickCalls, in_thread
from coppice.errors import Busy, InUse, NameTaken, NotFound
from coppice.model import Instance, Record, State
from coppice.model.ownership import no_instance
from coppice.state import users
from coppice.state.database import Database
from coppice.state.events import EventLog
from coppice.state.images import ImageRecords
from coppice.state.journal import COMMITS, JournalEntry, JournalOperation
from coppice.state.load import Load, read_load
from coppice.state.snapshots import SnapshotStore
from coppice.state.supervised import Supervised
from coppice.state.volumes import SHOWN_NAME, VolumeStore, require_attachable

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Instance).decode


class Census(Record, frozen=True, kw_only=True):
    """How many instances are in each state, and the process ids of their VMMs."""

    states: dict[str, int]
    pids: tuple[int, ...]


_JOURNAL = "SELECT instance, operation, owner_pid, owner_ticks, started_at FROM journal"
_WITH_JOURNAL = """
    SELECT record, journal.instance, operation, owner_pid, owner_ticks, started_at
    FROM instances LEFT JOIN journal ON journal.instance = instances.id
    WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC
"""
Allocate = Callable[[sqlite3.Connection, Sequence[Instance]], list[Instance]]


def _as_asked(_: sqlite3.Connection, instances: Sequence[Instance]) -> list[Instance]:
    return list(instances)


class Store(QuickCalls):
    """All methods block; see `Database`."""

    def __init__(self, path: Path, owner: tuple[int, int], allocate: Allocate = _as_asked) -> None:
        """`owner` is the pid and start ticks that the journal records for operations of this
        process.

        `allocate` gives new instances their unique addresses, inside the transaction that records
        them.
        """
        self.path = path
        self._db = Database(path)
        self._owner = owner
        self._allocate = allocate
        self._listed: list[Instance] = []
        self._listed_at: tuple[int, int] | None = None  # versions of the database, see `instances`
        self.images = ImageRecords(self._db)
        self.events = EventLog(self._db)
        self.supervised = Supervised(self._db)
        self.snapshots = SnapshotStore(self._db, self._journal)
        self.volumes = VolumeStore(self._db, self._journal)

    def close(self) -> None:
        """Close the database. Idempotent."""
        self._db.close()

    # Instances

    def get(self, reference: str) -> Instance:
        """Return the instance with this id or name.

        :raises NotFound: there is none
        """
        with self._db.read() as connection:
            row = connection.execute(
                "SELECT record FROM instances WHERE id = ?1 OR name = ?1 ORDER BY id = ?1 DESC", (reference,)
            ).fetchone()
        if row is None:
            raise no_instance(reference)
        return _decode(row[0])

    def get_journaled(self, reference: str) -> tuple[Instance, JournalEntry | None]:
        """Return the instance with this id or name, and the operation under way or interrupted on it.

        :raises NotFound: there is none
        """
        with self._db.read() as connection:
            row = connection.execute(_WITH_JOURNAL, (reference,)).fetchone()
        if row is None:
            raise no_instance(reference)
        record, *entry = row
        return _decode(record), None if entry[0] is None else JournalEntry.of(entry)

    async def look_up(self, reference: str) -> tuple[Instance, JournalEntry | None]:
        """Do as `get_journaled` does, without blocking the event loop.

        If no other thread uses the database, the row is read at once: it takes 50 microseconds, and the way to a
        thread and back takes longer. Readers never wait for the writers of other processes.

        :raises NotFound: there is none
        """
        with self._db.unused() as unused:
            if unused:
                return self.get_journaled(reference)
        return await in_thread(self.get_journaled, reference)

    def require(self, instance: Instance) -> None:
        """Check that an instance is still recorded.

        :raises NotFound: another operation has removed it
        """
        with self._db.read() as connection:
            if not connection.execute("SELECT 1 FROM instances WHERE id = ?", (instance.id,)).fetchone():
                raise gone(instance)

    def instances(self) -> list[Instance]:
        """Return all instances, oldest first, without stems: a stem is internal to one
        operation.

        Nothing is read if no process has written since the last call: a list and its marks need two.
        """
        with self._db.read() as connection:
            version = (connection.execute("PRAGMA data_version").fetchone()[0], connection.total_changes)
            if version != self._listed_at:
                rows = connection.execute("SELECT record FROM instances ORDER BY created_at, rowid").fetchall()
                self._listed = [found for row in rows if (found := _decode(row[0])).stem_of is None]
                self._listed_at = version
            return list(self._listed)

    def ids(self) -> set[str]:
        """Return the ids of all instances."""
        with self._db.read() as connection:
            return {row[0] for row in connection.execute("SELECT id FROM instances").fetchall()}

    def known(self) -> set[str]:
        """Return the ids of all recorded instances, snapshots and volumes."""
        return self.ids() | self.snapshots.ids() | self.volumes.ids()

    def children(self, instance_id: str) -> list[Instance]:
        """Return the existing forks of this instance, which make up its fork count."""
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT record FROM instances WHERE parent = ? ORDER BY created_at, rowid", (instance_id,)
            ).fetchall()
        return [_decode(row[0]) for row in rows]

    def load(self) -> Load:
        """Count recorded and running instances, as seen by the current transaction."""
        with self._db.read() as connection:
            return read_load(connection)

    def census(self) -> Census:
        """Count the instances by state. Cheap: it decodes no record."""
        pid = "json_extract(CAST(record AS TEXT), '$.vmm.pid')"
        with self._db.read() as connection:
            states = dict(connection.execute("SELECT state, count(*) FROM instances GROUP BY state").fetchall())
            pids = connection.execute(f"SELECT {pid} FROM instances WHERE {pid} NOT NULL").fetchall()  # noqa: S608
        return Census(states=states, pids=tuple(row[0] for row in pids))

    def fork_counts(self) -> dict[str, int]:
        """Return the fork count by id, for instances that have forks."""
        with self._db.read() as connection:
            return dict(
                connection.execute(
                    "SELECT parent, count(*) FROM instances WHERE parent NOT NULL GROUP BY parent"
                ).fetchall()
            )

    def retire_kernel(self, key: str, retire: Callable[[], None]) -> None:
        """Call `retire` in a transaction that finds no user of the kernel.

        A transaction that records an instance checks that its kernel still exists.

        :raises InUse: instances or snapshots use it; the message names them
        """
        with self._db.write() as connection:
            users = connection.execute(
                f"""
                SELECT DISTINCT name
                FROM (SELECT {SHOWN_NAME} AS name, record FROM instances UNION ALL SELECT name, record FROM snapshots)
                WHERE json_extract(CAST(record AS TEXT), '$.machine.kernel') = ? ORDER BY name
                """,  # noqa: S608 - a constant
                (key,),
            ).fetchall()
            if users:
                raise InUse(
                    f"the kernel {key!r} is used by {', '.join(name for (name,) in users)}",
                    hint="remove them first with `coppice rm` or `coppice snapshot rm`",
                )
            retire()

    def retire_unused(self, retire: Callable[[], None]) -> None:
        """Call `retire` in a transaction that finds no operation under way.

        A later operation looks up what it needs again.

        :raises Busy: an operation is under way
        """
        with self._db.write() as connection:
            if connection.execute("SELECT 1 FROM journal").fetchone():
                raise Busy(
                    "operations that may need the caches are under way", hint="wait for them, or leave out --caches"
                )
            retire()

    def create(
        self, instances: Iterable[Instance], operation: JournalOperation, check: Callable[[], None] | None = None
    ) -> list[Instance]:
        """Record all new instances, or none, with the operation that makes them.

        Return them with their addresses and user ids. `check` runs inside the transaction.

        :raises NameTaken: a name is in use; the message says which
        :raises InUse: their volumes cannot all be attached
        """
        instances = list(instances)
        with self._db.write() as connection:
            if check is not None:
                check()
            require_attachable(connection, (instance.machine.volumes for instance in instances))
            made = self._allocate(connection, instances)
            made = [
                msgspec.structs.replace(instance, vmm_user=users.allocate(connection, instance.id)) for instance in made
            ]
            for instance in made:
                try:
                    connection.execute(
                        "INSERT INTO instances (id, name, state, parent, image, created_at, record, ram_bytes, vmm_bytes) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            instance.id, instance.name, instance.state, instance.parent, instance.image,
                            instance.created_at, _encode(instance), instance.machine.memory_bytes, instance.vmm_bytes,
                        ),
                    )  # fmt: skip
                except sqlite3.IntegrityError as error:
                    raise _taken(instance.name) from error
                self._journal(connection, instance.id, operation)
        return made

    def require_free(self, names: Iterable[str]) -> None:
        """Check that names are free now.

        Only `create` reserves them: another process may take them first.

        :raises NameTaken: a name is in use; the message says which
        """
        with self._db.read() as connection:
            for name in names:
                if connection.execute("SELECT 1 FROM instances WHERE name = ?", (name,)).fetchone():
                    raise _taken(name)

    def save(self, instance: Instance, *, done: bool = False, durable: bool = False) -> None:
        """Write a changed record.

        `done` also ends the operation in its journal row, in the same transaction.

        A `durable` change is on disk on return.

        :raises NotFound: the instance is gone
        """
        with self._db.write(durable=durable) as connection:
            if not _update(connection, instance, done=done):
                raise gone(instance)

    def save_all(self, instances: Iterable[Instance], *, done: bool = False) -> set[str]:
        """Do as `save` does, for several in one transaction; return the ids of those that are gone."""
        with self._db.write() as connection:
            return {each.id for each in instances if not _update(connection, each, done=done)}

    def record_sha256(self, instance_id: str, inode: int, sha256: str) -> bool:
        """Record the hash of a file of an instance's memory; return whether it was recorded.

        A file that was replaced, or already has a hash, is left alone. The caller holds the
        instance's lock.
        """
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM instances WHERE id = ?", (instance_id,)).fetchone()
            instance = _decode(row[0]) if row else None
            if instance is None or instance.capture is None:
                return False
            capture = instance.capture.with_sha256(inode, sha256)
            if capture is None:
                return False
            changed = _encode(msgspec.structs.replace(instance, capture=capture))
            connection.execute("UPDATE instances SET record = ? WHERE id = ?", (changed, instance_id))
            return True

    def promote(self, instance: Instance, state: State, *, public: bool = False) -> Instance:
        """Change an instance between Standby and Template, and whether the template is public.

        The change is on disk on return.

        :raises InUse: it is a template with forks; the message names them
        """
        changed = msgspec.structs.replace(instance, state=state, public=public and state is State.TEMPLATE)
        with self._db.write(durable=True) as connection:
            if state is State.STANDBY:
                _refuse_with_forks(connection, instance, "demoted")
            connection.execute(
                "UPDATE instances SET state = ?, record = ? WHERE id = ?", (state, _encode(changed), instance.id)
            )
        return changed

    # Journal

    def begin(self, instance: Instance, operation: JournalOperation, check: Callable[[], None] | None = None) -> bool:
        """Record that an operation starts on this instance, and the given record.

        `check` runs inside the transaction.

        :return: whether the journal had no operation on this instance
        :raises InUse: the operation is a removal and the instance is a template with forks
        """
        with self._db.write(durable=operation in COMMITS) as connection:
            if check is not None:
                check()
            if operation is JournalOperation.REMOVE and instance.state is State.TEMPLATE:
                _refuse_with_forks(connection, instance, "removed")
            settled = connection.execute("SELECT 1 FROM journal WHERE instance = ?", (instance.id,)).fetchone() is None
            self._journal(connection, instance.id, operation)
            _update(connection, instance, done=False)
            return settled

    def finish(self, instances: Iterable[Instance], operation: JournalOperation, *, durable: bool = False) -> None:
        """End an operation for all of these instances at once, if the journal still has it for
        them.

        If `durable`, this and all earlier changes are on disk on return.
        """
        with self._db.write(durable=durable) as connection:
            connection.executemany(
                "DELETE FROM journal WHERE instance = ? AND operation = ?",
                [(instance.id, operation) for instance in instances],
            )

    def sync(self) -> None:
        """Put all earlier changes on disk.

        :raises HostCannot: the database cannot be synced
        """
        self._db.sync()

    def begin_removal(self, instances: Iterable[Instance]) -> None:
        """Record that instances are to be removed, in any state; skip those that no longer
        exist.
        """
        with self._db.write() as connection:
            for instance in instances:
                if connection.execute("SELECT 1 FROM instances WHERE id = ?", (instance.id,)).fetchone():
                    self._journal(connection, instance.id, JournalOperation.REMOVE)

    def forget(self, instance_id: str) -> None:
        """Remove the record and the journal row of an instance whose directory is gone.

        Idempotent.
        """
        with self._db.write() as connection:
            connection.execute("DELETE FROM instances WHERE id = ?", (instance_id,))
            users.release(connection, instance_id)
            connection.execute("DELETE FROM journal WHERE instance = ?", (instance_id,))

    def reserve_user(self, instance_id: str) -> int:
        """Return a user id for a VMM that starts before its instance is recorded; `create` gives
        the instance the same.

        :raises NoSpace: all are in use
        """
        with self._db.write() as connection:
            return users.allocate(connection, instance_id)

    def release_user(self, instance_id: str) -> None:
        """Free the user id of an instance that was never recorded. Idempotent."""
        with self._db.write() as connection:
            users.release(connection, instance_id)

    def journal(self) -> list[JournalEntry]:
        """Return all operations under way or interrupted."""
        with self._db.read() as connection:
            return [JournalEntry.of(row) for row in connection.execute(_JOURNAL).fetchall()]

    def journal_entry(self, instance_id: str) -> JournalEntry | None:
        """Return the operation under way or interrupted on an instance, or None."""
        with self._db.read() as connection:
            row = connection.execute(f"{_JOURNAL} WHERE instance = ?", (instance_id,)).fetchone()
        return JournalEntry.of(row) if row else None

    def is_at(self, instance_id: str, operation: JournalOperation) -> bool:
        """Return whether that operation is under way or interrupted on an instance."""
        entry = self.journal_entry(instance_id)
        return entry is not None and entry.operation is operation

    def _journal(self, connection: sqlite3.Connection, instance_id: str, operation: JournalOperation) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO journal (instance, operation, owner_pid, owner_ticks, started_at) VALUES (?, ?, ?, ?, ?)",
            (instance_id, operation, *self._owner, time.time()),
        )


def _update(connection: sqlite3.Connection, instance: Instance, *, done: bool) -> bool:
    """Write a changed record, and end its operation if that is done; return whether the instance exists."""
    cursor = connection.execute(
        "UPDATE instances SET state = ?, record = ?, ram_bytes = ?, vmm_bytes = ? WHERE id = ?",  # the rest never changes
        (instance.state, _encode(instance), instance.machine.memory_bytes, instance.vmm_bytes, instance.id),
    )
    if done and cursor.rowcount:
        connection.execute("DELETE FROM journal WHERE instance = ?", (instance.id,))
    return cursor.rowcount > 0


def gone(instance: Instance) -> NotFound:
    """Return the error for an instance that another process has removed."""
    return NotFound(f"the instance {instance.name!r} is gone", hint="another process removed it: see `coppice ls`")


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
