"""The schema is made once, even by concurrent processes, migrated from older versions, and not
changed by an older Coppice.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from coppice.errors import HostCannot
from coppice.model import MIB, Image, Instance, Snapshot, State, Volume
from coppice.names import new_id
from coppice.snapshots.snapshot import new_snapshot
from coppice.state import database
from coppice.state.database import Database
from coppice.state.journal import JournalOperation
from coppice.state.load import Load
from coppice.state.migrations import MIGRATIONS
from coppice.state.store import Store
from coppice.vmm.process import own_process
from fakes.records import make_instance


def version(path: Path) -> int:
    """Return the schema version stored in a database file."""
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_a_new_database_has_the_newest_schema(tmp_path: Path) -> None:
    """The database also has a write-ahead log, so that readers do not wait for writers."""
    path = tmp_path / "coppice.db"
    Database(path).close()
    assert version(path) == len(MIGRATIONS)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_older_database_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of an older version are kept by the migration, which happens once."""
    path = tmp_path / "coppice.db"
    old = Store(path, own_process())
    (instance,) = old.create([make_instance("oak")], JournalOperation.RUN)
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


MACHINE = {"cpus": 1, "memory_bytes": 1 << 26, "overlay_bytes": 1 << 24, "kernel": "debian-6.1", "volumes": []}
MANIFEST = {
    "driver": "qemu",
    "vmm_version": "7.2",
    "machine": "microvm",
    "accel": "tcg",
    "cpu_model": "max",
    "cpu_flags": "",
    "kernel": "debian-6.1",
    "memory_bytes": 1 << 26,
    "cpus": 1,
    "tsc_khz": 2_000_000,
}
MEM_FILE = {"inode": 7, "device": 1, "size_bytes": 1 << 26, "sharing": "hardlink", "reason": "", "sha256": "0" * 64}
OF_BOTH = {
    "driver": "qemu",
    "image": "sha256:" + "0" * 64,
    "image_name": "debian",
    "machine": MACHINE,
    "process": {"argv": ["sleep"], "env": {}, "workdir": "/", "user": ""},
    "created_at": 1.0,
    "identity_serial": 3,
    "identified": True,
}
CAPTURED = {
    "mem_file": MEM_FILE,
    "manifest": MANIFEST,
    "captured_at": 2.5,
    "disk_stamp": "1:2:3",
    "open_ports": [1, 4],
    "frozen": True,
}


@pytest.fixture
def old_database(tmp_path: Path) -> Path:
    """Return a database of the last version in which captures were not separate records."""

    def instance(name: str, state: str, **fields: Any) -> dict[str, Any]:
        return {"id": name, "name": name, "state": state, "hostname": name, **OF_BOTH, **fields}

    def kept(name: str, kind: str, **fields: Any) -> dict[str, Any]:
        lineage = {"source": "oak", "source_name": "oak"}
        return {"id": name, "name": name, "kind": kind, **lineage, **OF_BOTH, **fields}

    instances = [
        instance("standby", "Standby", **CAPTURED),
        instance("booted", "Running", mem_file=None, manifest=MANIFEST, captured_at=None, open_ports=[]),
        instance("stopped", "Stopped", mem_file=None, manifest=MANIFEST, captured_at=None, disk_stamp="1:2:3"),
        instance("remapped", "Running", mem_file=MEM_FILE, manifest=MANIFEST, captured_at=None, started_at=2.0),
        instance("committed", "Running", mem_file=None, manifest=MANIFEST, captured_at=None, open_ports=[2]),
    ]
    snapshots = [
        kept("memory", "Standby", vmstate_sha256="1" * 64, **CAPTURED),
        kept("disk", "Stopped", disk_stamp="4:5:6", mem_file=None, manifest=None, captured_at=None),
    ]
    path = tmp_path / "coppice.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        for script in MIGRATIONS[:3]:
            assert isinstance(script, str)
            connection.executescript(script)
        for each in instances:
            connection.execute(
                "INSERT INTO instances VALUES (:id, :name, :state, NULL, :image, 1.0, :record)",
                each | {"record": json.dumps(each).encode()},
            )
        for each in snapshots:
            connection.execute(
                "INSERT INTO snapshots VALUES (:id, :name, 'oak', :image, 1.0, :record)",
                each | {"record": json.dumps(each).encode()},
            )
        connection.execute("INSERT INTO journal VALUES ('committed', 'standby-commit', 1, 0, 1.0)")
        connection.execute("PRAGMA user_version = 3")
    return path


def test_captures_of_old_records_are_kept(old_database: Path) -> None:
    """Old fields of a capture move into the capture; fields of a machine stay with the machine."""
    store = Store(old_database, own_process())
    whole = store.get("standby")
    assert whole.capture is not None
    assert whole.mem_file == whole.capture.mem_file
    assert (whole.capture.mem_file.inode, whole.capture.mem_file.sha256) == (7, "0" * 64)
    assert (whole.capture.captured_at, whole.capture.disk_stamp) == (2.5, "1:2:3")
    assert (whole.capture.open_ports, whole.capture.frozen, whole.capture.identity_serial) == ((1, 4), True, 3)
    assert whole.capture.manifest.tsc_khz == 2_000_000
    assert (whole.identity_serial, whole.identified) == (3, True)
    booted, stopped, remapped = store.get("booted"), store.get("stopped"), store.get("remapped")
    assert (booted.capture, booted.manifest and booted.manifest.accel) == (None, "tcg")
    assert stopped.capture is None
    assert remapped.capture is not None
    assert (remapped.capture.captured_at, remapped.capture.disk_stamp) == (2.0, "")
    committed = store.get("committed")
    assert committed.capture is not None  # recovery finishes it, and reads the file itself
    assert committed.capture.open_ports == (2,)
    memory, disk = store.snapshots.get("memory"), store.snapshots.get("disk")
    assert memory.capture is not None
    assert (memory.capture.vmstate_sha256, memory.disk_stamp) == ("1" * 64, "1:2:3")
    assert memory.capture.manifest.driver == "qemu"
    assert (disk.capture, disk.disk_stamp) == (None, "4:5:6")
    store.close()


@pytest.mark.parametrize("layers", [[], [4, 3]])
def test_layers_of_old_records_are_those_of_the_overlay(tmp_path: Path, layers: list[int]) -> None:
    """Before other disks had layers, a record had a list of them without a name."""
    path = tmp_path / "coppice.db"
    store = Store(path, own_process())
    (instance,) = store.create([make_instance("oak")], JournalOperation.RUN)
    store.snapshots.create(new_snapshot(instance, "kept", None, {}), JournalOperation.SNAPSHOT)
    store.snapshots.finish(store.snapshots._decode(only(path, "snapshots")))
    store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("instances", "snapshots"):
            old = json.loads(only(path, table)) | {"disk_layers": layers}
            connection.execute(f"UPDATE {table} SET record = ?", (json.dumps(old).encode(),))  # noqa: S608 - constants
        name_disks = MIGRATIONS[22]
        assert callable(name_disks)
        name_disks(connection)
    store = Store(path, own_process())
    expected = {"overlay": (4, 3)} if layers else {}
    assert store.get("oak").disk_layers == store.snapshots.get("kept").disk_layers == expected
    store.close()


def only(path: Path, table: str) -> bytes:
    """Return the only record of a table."""
    with closing(sqlite3.connect(path)) as connection:
        ((record,),) = connection.execute(f"SELECT record FROM {table}")  # noqa: S608 - a constant
        assert isinstance(record, bytes)
        return record


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partial migration would leave a schema that no version knows."""
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
    """An old Coppice does not write into an unknown schema."""
    path = tmp_path / "coppice.db"
    Database(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(HostCannot, match=f"schema {len(MIGRATIONS) + 1}") as refusal:
        Database(path)
    assert "newer Coppice" in str(refusal.value)
    assert version(path) == len(MIGRATIONS) + 1


def test_a_damaged_database_is_reported(tmp_path: Path) -> None:
    """A damaged file is an error of the host with a hint, not an SQLite traceback."""
    path = tmp_path / "coppice.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(HostCannot, match="not a database"):
        Database(path)


def test_concurrent_processes_share_one_schema(tmp_path: Path) -> None:
    """Eight processes open a data directory that does not exist yet: all succeed, and it is
    migrated once.
    """
    path = tmp_path / "coppice.db"
    program = (
        "import sys; from pathlib import Path; from coppice.state.database import Database; "
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
        process.stdout.readline()  # ready to begin
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    said = [process.communicate(timeout=30)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said
    assert version(path) == len(MIGRATIONS)


@pytest.mark.parametrize("kind", ["instance", "snapshot", "volume"])
def test_an_older_coppice_writes_no_record_after_an_upgrade(tmp_path: Path, kind: str) -> None:
    """A process that opened the database before an upgrade would erase fields that it does not
    know, so its writes are refused.
    """
    path = tmp_path / "coppice.db"
    store = Store(path, own_process())
    (instance,) = store.create([make_instance("oak")], JournalOperation.RUN)
    kept = new_snapshot(instance, "kept", None, {})
    data = Volume(id=new_id(), name="data", size_bytes=1, created_at=1.0)
    store.snapshots.create(kept, JournalOperation.SNAPSHOT)
    store.volumes.create(data, JournalOperation.VOLUME, lambda: None)
    with closing(sqlite3.connect(path)) as newer, newer:
        for table in ("instances", "snapshots", "volumes"):
            newer.execute(
                f"UPDATE {table} SET record = CAST(json_set(CAST(record AS TEXT), '$.newer', 'kept') AS BLOB)"  # noqa: S608 - constants
            )
        newer.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    changes: dict[str, Callable[[], object]] = {
        "instance": lambda: store.save(store.get("oak"), done=True),
        "snapshot": lambda: store.snapshots.finish(kept),
        "volume": lambda: store.volumes.finish(data),
    }
    with pytest.raises(HostCannot, match=f"schema {len(MIGRATIONS) + 1}") as refusal:
        changes[kind]()
    assert "newer Coppice" in str(refusal.value)
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        (record,) = connection.execute(f"SELECT record FROM {kind}s").fetchone()  # noqa: S608 - constants
        assert json.loads(record)["newer"] == "kept"
        assert connection.execute("SELECT count(*) FROM journal").fetchone() == (3,)


def test_the_sums_of_an_older_database_are_made(tmp_path: Path) -> None:
    """They are of the running machines, and those that are made."""
    path = tmp_path / "coppice.db"
    instances = [
        make_instance(name, state, vmm_bytes=3 * MIB)
        for name, state in (("oak", State.RUNNING), ("elm", State.STOPPED), ("fir", State.CREATED))
    ]
    Database(path, MIGRATIONS[:21]).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO instances (id, name, state, image, created_at, record) VALUES (?, ?, ?, ?, 1.0, ?)",
            [(each.id, each.name, each.state, each.image, msgspec.json.encode(each)) for each in instances],
        )
    with closing(Store(path, own_process())) as store:
        memory_bytes = instances[0].machine.memory_bytes
        running = Load(instances=3, running=2, ram_bytes=2 * memory_bytes, vmm_bytes=6 * MIB)
        assert store.load() == running
        store.begin(instances[1], JournalOperation.START)
        assert store.load() == Load(instances=3, running=3, ram_bytes=3 * memory_bytes, vmm_bytes=9 * MIB)


STORED = (Instance, Snapshot, Volume, Image, JournalOperation, State)
SHAPES = {
    6: "20662d2c1ffa1ce0",
    7: "6e6c47311d00a6ce",
    8: "59475a7eaaa5c0a7",
    9: "ff1d8d0753d7e335",
    10: "715b75f2e6b56125",
    11: "1a66053a57ef17be",
    12: "1a66053a57ef17be",
    13: "1a66053a57ef17be",
    14: "fe18b1e5a8acc132",
    15: "a950e88610c4bbd1",
    16: "37739f31a007bc5f",
    17: "2de743abdc7b7d2f",
    18: "b14a7c55d7bb631e",
    19: "ad66fc9d78dd0549",
    20: "ad66fc9d78dd0549",
    21: "41cebab00b63cd63",
    22: "41cebab00b63cd63",
    23: "3a771741556792f5",
    24: "14698133538c7c66",
    25: "6d1e543b49bf935d",
}  # by schema version


def test_a_stored_record_does_not_change_without_a_new_schema_version() -> None:
    """An older Coppice knows only by the version that it must not write. A change to a stored
    record needs a migration and a new line above.
    """
    assert SHAPES[len(MIGRATIONS)] == shape(STORED)


def shape(kinds: tuple[type, ...]) -> str:
    """Return a digest of the names of all stored fields and enum values, nested records included."""
    seen: dict[str, list[str]] = {}
    pending = list(kinds)
    while pending:
        kind = pending.pop()
        if issubclass(kind, StrEnum):
            seen[kind.__name__] = list(kind)
        elif issubclass(kind, msgspec.Struct) and kind.__name__ not in seen:
            seen[kind.__name__] = list(kind.__struct_fields__)
            for annotation in get_type_hints(kind).values():
                pending += [found for found in (annotation, *flat(annotation)) if isinstance(found, type)]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def flat(annotation: object) -> list[object]:
    """Return all types in an annotation."""
    return [found for part in get_args(annotation) for found in (part, *flat(part))]


def test_instances_of_older_versions_get_user_ids(old_database: Path) -> None:
    """Each instance gets a unique id, the same in its record and in the table of user ids."""
    store = Store(old_database, own_process())
    found = {instance.id: instance.vmm_user for instance in store.instances()}
    assert len(set(found.values())) == len(found) == 5
    assert None not in found.values()
    assert {key: store.reserve_user(key) for key in found} == found
    store.close()
