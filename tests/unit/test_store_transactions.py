"""A transaction that fails, at any point, is over, and its error gives the reason."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from coppice.errors import Busy, HostCannot, NoSpace
from coppice.state import database
from coppice.state.database import Database
from coppice.state.reserve import LOW, keep


def test_a_full_disk_is_reported_and_the_next_write_works(tmp_path: Path) -> None:
    """SQLite has then already undone the transaction: a second rollback would hide the reason."""
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


def test_a_failed_commit_does_not_block_other_writers(tmp_path: Path) -> None:
    """A transaction left open would hold the database's only write lock until its process ends."""
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


def test_the_wait_for_a_held_data_directory_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may be suspended while it opens the directory, or another program may hold
    its lock: later processes must not hang.
    """
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.05)
    holder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another process has locked"):
            Database(tmp_path / "coppice.db")
    finally:
        os.close(holder)
    Database(tmp_path / "coppice.db").close()


def test_the_reserve_of_a_copied_data_directory_is_refilled(tmp_path: Path) -> None:
    """`cp` skips blocks of zeros, and a hole frees no space on a full disk."""
    reserve = tmp_path / "coppice.db-reserve"
    keep(reserve)
    held = reserve.stat()
    assert held.st_blocks * 512 >= held.st_size > 0
    reserve.unlink()
    with reserve.open("wb") as copied:
        copied.truncate(held.st_size)
    assert reserve.stat().st_blocks == 0
    keep(reserve)
    assert reserve.stat().st_blocks == held.st_blocks


def test_the_reserve_is_made_again_when_there_is_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server keeps its database open for weeks, and a disk can be full twice."""
    database, reserve = Database(tmp_path / "coppice.db"), tmp_path / "coppice.db-reserve"
    real = os.statvfs(tmp_path)
    free = 0

    def statvfs(_: Path) -> os.statvfs_result:
        blocks = free // real.f_frsize
        return os.statvfs_result((*real[:3], blocks, blocks, *real[5:]))

    monkeypatch.setattr(os, "statvfs", statvfs)
    for free, kept in ((0, False), (LOW, False), (2 * LOW, True), (0, False), (4 * LOW, True)):
        with database.write() as connection:
            connection.execute("SELECT 1")
        assert reserve.exists() == kept, free
    database.close()


def test_a_file_system_without_shared_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite raises no error, and would go on in a mode in which readers stop writers."""

    def connect(path: Path, **settings: Any) -> sqlite3.Connection:
        return sqlite3.Connection(f"file:{path}?vfs=unix-dotfile", uri=True, **settings)

    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(HostCannot, match=r"stays 'delete'\); set COPPICE_HOME"):
        Database(tmp_path / "coppice.db")
