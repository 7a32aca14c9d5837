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
_VMM_BYTES = 32 << 20  # of records of earlier versions, which do not have it
# A new record counts as running: most will run, and too high an estimate is safer than too low.
LOAD = f"""
    SELECT (SELECT count(*) FROM instances), count(*),
           coalesce(sum(json_extract(CAST(record AS TEXT), '$.machine.memory_bytes')), 0),
           coalesce(sum(coalesce(json_extract(CAST(record AS TEXT), '$.vmm_bytes'), {_VMM_BYTES})), 0)
    FROM instances
    WHERE state IN ({_RUNS}) OR id IN (SELECT instance FROM journal WHERE operation IN ({_STARTING}))
"""  # noqa: S608 - constants


def read_load(connection: sqlite3.Connection) -> Load:
    """Count recorded and running instances in an open database."""
    return Load(**dict(zip(Load.__struct_fields__, connection.execute(LOAD).fetchone(), strict=True)))
