"""How much the recorded instances take of the host, counted in SQL."""

from __future__ import annotations

import sqlite3

from coppice.model import Record, State
from coppice.state.journal import JournalOperation


class Load(Record, frozen=True, kw_only=True):
    """Counts of the recorded instances."""

    instances: int = 0
    running: int = 0  # with a VMM, or being made or started
    ram_bytes: int = 0  # of the running ones
    vmm_bytes: int = 0  # that their VMMs may take


_AT_REST = (State.STOPPED, State.STANDBY, State.TEMPLATE)
_RUNS = ", ".join(f"'{state}'" for state in State if state not in _AT_REST)
_STARTING = ", ".join(f"'{operation}'" for operation in (JournalOperation.START, JournalOperation.RESTORE))
# A new record counts as running: most will run, and too high an estimate is safer than too low. Triggers keep the sums
# (see `add_load`), so the count takes as long with thousands of instances as with none.
LOAD = f"""
    SELECT kept.instances, kept.running + count(id), kept.ram_bytes + coalesce(sum(starting.ram_bytes), 0),
        kept.vmm_bytes + coalesce(sum(starting.vmm_bytes), 0)
    FROM load AS kept LEFT JOIN (
        SELECT id, instances.ram_bytes, instances.vmm_bytes FROM journal CROSS JOIN instances ON id = instance
        WHERE operation IN ({_STARTING}) AND state NOT IN ({_RUNS})
    ) AS starting
"""  # noqa: S608 - constants


def _counted(row: str, sign: str) -> str:
    runs = f"({row}.state IN ({_RUNS}))"
    return f"""
        UPDATE load SET instances = instances {sign} 1, running = running {sign} {runs},
            ram_bytes = ram_bytes {sign} {runs} * {row}.ram_bytes, vmm_bytes = vmm_bytes {sign} {runs} * {row}.vmm_bytes
    """  # noqa: S608 - constants


_VMM_BYTES = 32 << 20  # of records of earlier versions, which do not have it
INDEX_LOAD = f"""
    ALTER TABLE instances ADD COLUMN ram_bytes INTEGER
    GENERATED ALWAYS AS (json_extract(CAST(record AS TEXT), '$.machine.memory_bytes'));
    ALTER TABLE instances ADD COLUMN vmm_bytes INTEGER
    GENERATED ALWAYS AS (coalesce(json_extract(CAST(record AS TEXT), '$.vmm_bytes'), {_VMM_BYTES}));
    DROP INDEX instances_state;
    CREATE INDEX instances_load ON instances (state, ram_bytes, vmm_bytes)
"""
_KEEP = (
    "DROP INDEX instances_load",
    "CREATE INDEX instances_state ON instances (state)",  # the census counts by it
    "CREATE TABLE load (instances INTEGER, running INTEGER, ram_bytes INTEGER, vmm_bytes INTEGER) STRICT",
    f"""
    INSERT INTO load
    SELECT count(*), count(runs), coalesce(sum(ram_bytes), 0), coalesce(sum(vmm_bytes), 0)
    FROM (SELECT NULL AS runs, 0 AS ram_bytes, 0 AS vmm_bytes FROM instances WHERE state NOT IN ({_RUNS})
        UNION ALL SELECT 1, ram_bytes, vmm_bytes FROM instances WHERE state IN ({_RUNS}))
    """,  # noqa: S608 - constants
    # Columns of their own: to generate them from the record takes longer than the rest of a trigger.
    *(
        statement
        for name in ("ram_bytes", "vmm_bytes")
        for statement in (
            f"ALTER TABLE instances ADD COLUMN own_{name} INTEGER NOT NULL DEFAULT 0",
            f"UPDATE instances SET own_{name} = {name}",  # noqa: S608 - a constant
            f"ALTER TABLE instances DROP COLUMN {name}",
            f"ALTER TABLE instances RENAME COLUMN own_{name} TO {name}",
        )
    ),
    f"CREATE TRIGGER load_made AFTER INSERT ON instances BEGIN {_counted('NEW', '+')}; END",
    f"CREATE TRIGGER load_removed AFTER DELETE ON instances BEGIN {_counted('OLD', '-')}; END",
    f"""
    CREATE TRIGGER load_changed AFTER UPDATE OF state, ram_bytes, vmm_bytes ON instances
    WHEN (OLD.state IN ({_RUNS})) IS NOT (NEW.state IN ({_RUNS}))
        OR OLD.ram_bytes IS NOT NEW.ram_bytes OR OLD.vmm_bytes IS NOT NEW.vmm_bytes
    BEGIN {_counted("OLD", "-")}; {_counted("NEW", "+")}; END
    """,
)


def add_load(connection: sqlite3.Connection) -> None:
    """Make the table of sums and its triggers."""
    for statement in _KEEP:
        connection.execute(statement)


def read_load(connection: sqlite3.Connection) -> Load:
    """Count recorded and running instances in an open database."""
    return Load(**dict(zip(Load.__struct_fields__, connection.execute(LOAD).fetchone(), strict=True)))
