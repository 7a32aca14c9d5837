"""The schema of the database, version by version, and the migrations of older records."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import msgspec

from coppice.state import users
from coppice.state.event_schema import add_events, add_process_ends
from coppice.state.load import INDEX_LOAD, add_load
from coppice.state.supervision_schema import add_schedules, add_supervision
from coppice.state.takeover import take_over_images

Migration = str | Callable[[sqlite3.Connection], None]
"""SQL statements separated by semicolons, or a function called inside the migration's
transaction.
"""

_OF_CAPTURE = ("mem_file", "captured_at", "disk_stamp", "open_ports", "frozen", "identity_serial", "vmstate_sha256")


def _move_captures(connection: sqlite3.Connection) -> None:
    """Move the capture fields of instances and snapshots into a record of their own."""
    committed = {
        row[0] for row in connection.execute("SELECT instance FROM journal WHERE operation = 'standby-commit'")
    }
    for table in ("instances", "snapshots"):
        for key, record in connection.execute(f"SELECT id, record FROM {table}").fetchall():  # noqa: S608 - constants
            moved = _with_capture(msgspec.json.decode(record), table, committed=key in committed)
            connection.execute(
                f"UPDATE {table} SET record = ? WHERE id = ?",  # noqa: S608 - constants
                (msgspec.json.encode(moved), key),
            )


def _with_capture(record: dict[str, Any], table: str, *, committed: bool) -> dict[str, Any]:
    capture = {field: record[field] for field in _OF_CAPTURE if record.get(field) is not None}
    capture["manifest"] = record.get("manifest")
    capture.setdefault("captured_at", record.get("started_at") or record["created_at"])
    if committed and capture["manifest"]:  # finishing the capture reads the file itself
        size_bytes = capture["manifest"]["memory_bytes"]
        capture.setdefault("mem_file", {"inode": 0, "device": 0, "size_bytes": size_bytes, "sharing": "own"})
    # An instance keeps counting its identity messages. A snapshot has a stamp and a manifest only
    # if it has files.
    kept = {"instances": {"identity_serial"}, "snapshots": {"disk_stamp"}}[table]
    moved = {field: value for field, value in record.items() if field not in set(_OF_CAPTURE) - kept}
    if table == "snapshots":
        moved.pop("manifest", None)
    moved["capture"] = capture if capture["manifest"] and "mem_file" in capture else None
    return moved


def _give_users(connection: sqlite3.Connection) -> None:
    """Give each instance a user id for its VMM.

    A running one keeps the id it was started with, from an older range.
    """
    connection.execute("CREATE TABLE vmm_users (number INTEGER PRIMARY KEY, instance TEXT NOT NULL UNIQUE) STRICT")
    for key, record in connection.execute("SELECT id, record FROM instances").fetchall():
        given = msgspec.json.decode(record) | {"vmm_user": users.allocate(connection, key)}
        encoded = msgspec.json.encode(given)
        connection.execute("UPDATE instances SET record = ? WHERE id = ?", (encoded, key))


def _name_disks(connection: sqlite3.Connection) -> None:
    """Give the layers of the overlay disk its name: the other disks of a machine may have layers too."""
    for table in ("instances", "snapshots"):
        for key, record in connection.execute(f"SELECT id, record FROM {table}").fetchall():  # noqa: S608 - constants
            named = msgspec.json.decode(record)
            layers = named.pop("disk_layers", None)
            if layers:
                named["disk_layers"] = {"overlay": layers}
            connection.execute(
                f"UPDATE {table} SET record = ? WHERE id = ?",  # noqa: S608 - constants
                (msgspec.json.encode(named), key),
            )


def _keep(connection: sqlite3.Connection) -> None:
    """Change nothing.

    Newer records have fields that an older Coppice would lose; older records use the defaults.
    """


# One entry per schema version. Entries are never edited after a release, only appended. A stored
# record that gains or loses a field needs a new version too: an older Coppice writes records whole,
# and refuses to write to a database of a newer version.
MIGRATIONS: tuple[Migration, ...] = (
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
    _move_captures,
    take_over_images,
    _give_users,
    _keep,  # records of instances and snapshots gain an egress policy, those of kernels their features
    _keep,  # captures name the processes whose random generators their forks share
    _keep,  # captures gain layers
    _keep,  # records of instances and snapshots gain limits
    _keep,  # images and processes gain certificates
    add_events,
    "CREATE INDEX instances_state ON instances (state)",  # budgets count the running instances
    _keep,  # records of images gain the digest of the registry's manifest
    add_supervision,
    _keep,  # instances and snapshots gain the layers of their disks
    _keep,  # disks of volumes may be private clones
    _keep,  # instances gain the memory that their VMMs may take
    add_process_ends,  # records of instances also gain the end of their process, and its endpoint for notices
    INDEX_LOAD,
    _keep,  # checks of health gain a text, captures what was printed of it, instances the begin of their console
    add_load,
    _name_disks,  # volumes also gain layers
    add_schedules,  # snapshots also gain whether a schedule made them
    _keep,  # the journal gains the merge of the layers of disks
)
