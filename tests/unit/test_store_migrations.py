"""The schema: made once however many begin at once, carried over from older versions, not touched by an older Coppice."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from coppice.errors import HostCannot
from coppice.store import database
from coppice.store.database import MIGRATIONS, Database
from coppice.store.store import Store
from coppice.vmm.process import own_process
from fakes.records import make_instance


def version(path: Path) -> int:
    """The schema version that is stored in a database file."""
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_a_new_database_has_the_newest_schema(tmp_path: Path) -> None:
    """And the write-ahead log, so that readers do not wait for writers."""
    path = tmp_path / "coppice.db"
    Database(path).close()
    assert version(path) == len(MIGRATIONS)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_older_database_is_carried_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that an older version wrote are there after the migration, and it happens once."""
    path = tmp_path / "coppice.db"
    old = Store(path, own_process())
    instance = make_instance("oak")
    old.create([instance], "run")
    old.close()
    newer = (*MIGRATIONS, "ALTER TABLE instances ADD COLUMN note TEXT; UPDATE instances SET note = 'moved'")
    monkeypatch.setattr(database, "MIGRATIONS", newer)
    for _ in range(2):
        store = Store(path, own_process())
        assert store.get("oak") == instance
        store.close()
    assert version(path) == len(newer)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT note FROM instances").fetchall() == [("moved",)]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a migration would be a schema that no version knows."""
    path = tmp_path / "coppice.db"
    Database(path).close()
    before = version(path)
    monkeypatch.setattr(
        database, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE extra (x) STRICT; CREATE TABLE extra2 (x INT)")
    )
    with pytest.raises(HostCannot):
        Database(path)
    assert version(path) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'extra%'").fetchall() == []


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    """An old Coppice does not write into what it does not know."""
    path = tmp_path / "coppice.db"
    Database(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(HostCannot, match=f"schema {len(MIGRATIONS) + 1}") as refusal:
        Database(path)
    assert "newer Coppice" in str(refusal.value)
    assert version(path) == len(MIGRATIONS) + 1


def test_what_is_no_database_is_said_so(tmp_path: Path) -> None:
    """A damaged file is an error of this host with a cure, not a traceback of SQLite's."""
    path = tmp_path / "coppice.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(HostCannot, match="not a database"):
        Database(path)


def test_processes_that_begin_at_once_share_one_schema(tmp_path: Path) -> None:
    """Eight processes open a data directory that is not there yet: all of them can, and it is migrated once."""
    path = tmp_path / "coppice.db"
    program = (
        "import sys; from pathlib import Path; from coppice.store.database import Database; "
        "print(flush=True); sys.stdin.read(); Database(Path(sys.argv[1])).close()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready to begin
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    said = [process.communicate(timeout=30)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said
    assert version(path) == len(MIGRATIONS)
