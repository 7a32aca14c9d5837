"""SQLite (WAL): the connection, its transactions and the schema's migrations.

Any number of host processes use one database. Each transaction is short and starts with BEGIN IMMEDIATE, so that two writers wait for each other
instead of failing half-way. Calls block (for well below a millisecond, unless another process writes): callers in an event loop use threads.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from coppice.errors import Busy, CoppiceError, HostCannot, NoSpace
from coppice.store import locks
from coppice.store.reserve import keep, release

_BUSY_TIMEOUT_S = 30.0

# One entry per schema version; never edited after a release, only appended to.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE instances (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        state      TEXT NOT NULL,
        parent     TEXT,
        image      TEXT NOT NULL,
        created_at REAL NOT NULL,
        record     BLOB NOT NULL
    ) STRICT;
    CREATE INDEX instances_parent ON instances (parent);
    CREATE INDEX instances_image ON instances (image);
    CREATE TABLE journal (
        instance    TEXT PRIMARY KEY,
        operation   TEXT NOT NULL,
        owner_pid   INTEGER NOT NULL,
        owner_ticks INTEGER NOT NULL,
        started_at  REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE snapshots (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        source     TEXT NOT NULL,
        image      TEXT NOT NULL,
        created_at REAL NOT NULL,
        record     BLOB NOT NULL
    ) STRICT;
    CREATE INDEX snapshots_source ON snapshots (source);
    CREATE INDEX snapshots_image ON snapshots (image)
    """,
    """
    CREATE TABLE volumes (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL,
        record     BLOB NOT NULL
    ) STRICT
    """,
)


class Database:
    """One connection, shared by the threads of a process."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._path = path
        reserve = path.with_name(f"{path.name}-reserve")
        try:
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise _translated(error, path) from error
        try:
            # SQLite does not wait its turn for the switch to WAL: of two processes that begin at once, one would fail.
            with _alone_in(path.parent):
                try:
                    self._prepare()
                except sqlite3.Error as error:
                    if not (_is_full(error) and release(reserve)):
                        raise
                    self._prepare()
                else:
                    keep(reserve)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.Error):
                raise _translated(error, path) from error
            raise

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        # NORMAL: a commit survives the death of any process; after a power cut the last ones may be undone, never torn.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._migrate()

    def _migrate(self) -> None:
        if self._version() == len(MIGRATIONS):
            return
        with self._immediate() as connection:
            version = self._version()  # again, now that no other process can migrate
            if version > len(MIGRATIONS):
                raise HostCannot(
                    f"the data directory has schema {version}, this Coppice knows {len(MIGRATIONS)}",
                    hint="use the newer Coppice that wrote it, or another COPPICE_HOME",
                )
            for script in MIGRATIONS[version:]:
                for statement in script.split(";"):
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    @contextlib.contextmanager
    def _immediate(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has ended it already
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing.

        :raises NoSpace: the disk is full
        :raises CoppiceError: the database cannot be used
        """
        with self._lock:
            try:
                with self._immediate() as connection:
                    yield connection
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise _translated(error, self._path) from error

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Single statements, each on the latest committed state."""
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise _translated(error, self._path) from error

    def sync(self) -> None:
        """Make all commits so far survive a power cut."""
        with self.read() as connection:
            connection.execute("PRAGMA wal_checkpoint(FULL)")

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with self._lock:
            self._connection.close()


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        busy = Busy(
            f"another process holds the data directory {directory} for more than {_BUSY_TIMEOUT_S:g} s",
            hint="see who does with `lslocks`: it may have been stopped",
        )
        locks.wait_for(descriptor, _BUSY_TIMEOUT_S, busy)
        yield
    finally:
        os.close(descriptor)


def _is_full(error: sqlite3.Error) -> bool:
    """Whether the disk is full. The index of the write-ahead log, which the first one to open it makes, has an error of its own for that."""
    return getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def _translated(error: sqlite3.Error, path: Path) -> CoppiceError:
    if _is_full(error):
        return NoSpace(f"no space for the database {path}", hint="free some, or remove instances with `coppice rm`")
    return HostCannot(
        f"the database {path} cannot be used: {error}", hint="check the data directory with `coppice doctor`"
    )
