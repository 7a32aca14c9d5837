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
# A new record counts as running: most will run, and too high an estimate is safer than too low. Both sums are taken
# from an index (see `INDEX_LOAD`), so thousands of running instances cost no more than a few tenths of a millisecond.
LOAD = f"""
    SELECT (SELECT count(*) FROM instances), count(*), coalesce(sum(ram_bytes), 0), coalesce(sum(vmm_bytes), 0)
    FROM (
        SELECT ram_bytes, vmm_bytes FROM instances WHERE state IN ({_RUNS})
        UNION ALL
        SELECT ram_bytes, vmm_bytes FROM journal CROSS JOIN instances ON id = instance
        WHERE operation IN ({_STARTING}) AND state NOT IN ({_RUNS})
    )
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


def read_load(connection: sqlite3.Connection) -> Load:
    """Count recorded and running instances in an open database."""
    return Load(**dict(zip(Load.__struct_fields__, connection.execute(LOAD).fetchone(), strict=True)))
