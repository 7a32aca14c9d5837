"""Transactions: one that fails, wherever it fails, is over, and the error says what happened."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coppice.errors import NoSpace
from coppice.store.database import Database


def test_a_full_disk_is_said_to_be_one_and_the_next_write_works(tmp_path: Path) -> None:
    """SQLite has undone the transaction by itself then: to undo it again would hide what happened."""
    database = Database(tmp_path / "coppice.db")
    with database.read() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    rows = [(f"{number}", "x" * 4000) for number in range(100)]
    with pytest.raises(NoSpace), database.write() as connection:
        connection.executemany("INSERT INTO journal VALUES (?, ?, 1, 1, 0.0)", rows)
    with database.read() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    with database.write() as connection:
        connection.execute("INSERT INTO journal VALUES ('a', 'b', 1, 1, 0.0)")
    with database.read() as connection:
        assert connection.execute("SELECT count(*) FROM journal").fetchone() == (1,)
    database.close()


def test_a_commit_that_fails_does_not_keep_the_others_out(tmp_path: Path) -> None:
    """A transaction that stayed open would hold the database's only write lock until its process ends."""
    first, second = Database(tmp_path / "coppice.db"), Database(tmp_path / "coppice.db")
    with first.read() as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("CREATE TABLE parents (id INTEGER PRIMARY KEY)")
        connection.execute("CREATE TABLE children (parent REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(sqlite3.IntegrityError), first.write() as connection:
        connection.execute("INSERT INTO children VALUES (1)")  # refused at the commit
    with second.write() as connection:
        connection.execute("INSERT INTO journal VALUES ('a', 'b', 1, 1, 0.0)")
    first.close()
    second.close()
