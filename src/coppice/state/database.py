"""SQLite (WAL): the connection, its transactions and the schema's migrations.

Any number of host processes share one database. Each transaction is short and starts with BEGIN
IMMEDIATE, so that two writers wait for each other instead of failing half-way. Calls block, usually
for well below a millisecond, longer while another process writes: callers in an event loop use
threads.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from coppice.errors import Busy, CoppiceError, HostCannot, NoSpace
from coppice.linux.files import os_errors, sync
from coppice.state import locks
from coppice.state.migrations import MIGRATIONS, Migration
from coppice.state.reserve import LOW, keep, release

_BUSY_TIMEOUT_S = 30.0
# A commit survives the death of any process. After a power cut the last commits may be undone,
# never torn.
_SURVIVES_PROCESSES = "PRAGMA synchronous = NORMAL"
# A commit returns after an fsync of the write-ahead log, so it and all earlier commits survive a
# power cut. Readers cannot delay it.
_SURVIVES_POWER_CUTS = "PRAGMA synchronous = FULL"


class Database:
    """One connection, shared by the threads of a process."""

    def __init__(self, path: Path, migrations: Sequence[Migration] | None = None) -> None:
        """`migrations` make the schema. Default: that of instances, images and so on."""
        self._migrations = MIGRATIONS if migrations is None else migrations
        self._lock = threading.RLock()
        self._path = path
        self._reserve = path.with_name(f"{path.name}-reserve")
        self._reserve_is_used = False
        try:
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        try:
            # SQLite does not wait for a lock when it switches to WAL: if two processes began at
            # once, one would fail.
            with _alone_in(path.parent):
                try:
                    self._prepare()
                except sqlite3.Error as error:
                    if not (_is_full(error) and release(self._reserve)):
                        raise
                    self._prepare()
                else:
                    keep(self._reserve)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.Error):
                raise _translated(error, path) from error
            raise

    def _prepare(self) -> None:
        (mode,) = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":  # SQLite raises no error
            raise HostCannot(
                f"the file system of {self._path} cannot hold the database: it has no shared memory (SQLite's journal "
                f"mode stays {mode!r})",
                hint="set COPPICE_HOME to a directory on a local file system, such as ext4 or XFS",
            )
        self._connection.execute(_SURVIVES_PROCESSES)
        self._migrate()

    def _migrate(self) -> None:
        if self._version() == len(self._migrations):
            return
        with self._immediate() as connection:
            version = self._version()  # read again: now no other process can migrate
            self._require_known(version)
            for migration in self._migrations[version:]:
                if callable(migration):
                    migration(connection)
                    continue
                for statement in migration.split(";"):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(self._migrations)}")

    def _require_known(self, version: int) -> None:
        if version > len(self._migrations):
            raise HostCannot(
                f"the database {self._path} has schema {version}, but this Coppice knows only {len(self._migrations)}",
                hint="use the newer Coppice that upgraded it, or another COPPICE_HOME",
            )

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    @contextlib.contextmanager
    def _immediate(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has already ended it
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def write(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """Run the block as one atomic transaction.

        After a `durable` one, it and all earlier commits are on disk.

        :raises NoSpace: the disk is full
        :raises HostCannot: the database cannot be used, its file cannot be synced, or a newer
            Coppice has upgraded it
        """
        with self._lock:
            try:
                self._make_space()
                if durable:
                    self._connection.execute(_SURVIVES_POWER_CUTS)
                try:
                    with self._immediate() as connection:
                        # Records are rewritten whole: this version would erase the fields that only
                        # a newer one knows.
                        self._require_known(self._version())
                        yield connection
                finally:
                    if durable:
                        self._connection.execute(_SURVIVES_PROCESSES)
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise _translated(error, self._path) from error

    def _make_space(self) -> None:
        """On a nearly full disk, let the next commit use the reserve, and the part of the log that is in the database
        already: else no instance could be removed.
        """
        disk = os.statvfs(self._path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free < LOW:
            self._reserve_is_used = release(self._reserve) or self._reserve_is_used
            with contextlib.suppress(sqlite3.OperationalError):  # the database itself cannot grow
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        elif self._reserve_is_used and free >= 2 * LOW:
            keep(self._reserve)
            self._reserve_is_used = False

    def sync(self) -> None:
        """Put all earlier commits on disk. SQLite's locks are on other files than this log.

        :raises HostCannot: the log cannot be synced
        """
        with os_errors(f"sync the database {self._path}"):
            sync(self._path.with_name(f"{self._path.name}-wal"))

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Run single statements, each on the latest committed state."""
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise _translated(error, self._path) from error

    @contextlib.contextmanager
    def unused(self) -> Iterator[bool]:
        """Yield whether no other thread uses the connection, and keep it so during the block. Does not block."""
        taken = self._lock.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._lock.release()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with self._lock:
            self._connection.close()


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        busy = Busy(
            f"another process has locked the data directory {directory} for more than {_BUSY_TIMEOUT_S:g} s",
            hint="find the process with `lslocks`: it may be suspended",
        )
        locks.wait_for(descriptor, _BUSY_TIMEOUT_S, busy)
        yield
    finally:
        os.close(descriptor)


def _is_full(error: sqlite3.Error) -> bool:
    """Return whether the disk is full.

    The first opener makes the index of the write-ahead log, which has its own error code.
    """
    return getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def _translated(error: sqlite3.Error, path: Path) -> CoppiceError:
    if _is_full(error):
        return NoSpace(
            f"no disk space for the database {path}", hint="free disk space, or remove instances with `coppice rm`"
        )
    return HostCannot(f"cannot use the database {path}: {error}", hint="check the data directory with `coppice doctor`")
