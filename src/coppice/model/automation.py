"""Snapshot schedules, and the status of an automatic standby. Few commands need them."""

from typing import Literal

from coppice.model.record import Record


class SnapshotSchedule(Record, frozen=True, kw_only=True):
    """Snapshots that the supervisor takes of one instance, and how long they are kept."""

    instance: str  # id
    interval_s: float
    max_count: int = 0  # of its snapshots; 0: any number
    max_age_s: float = 0.0  # 0: any age
    name_prefix: str = ""  # of the snapshots' names; empty: the instance's name
    tags: dict[str, str] = {}  # of the snapshots
    created_at: float
    updated_at: float
    next_run_at: float
    last_run_at: float | None = None
    last_snapshot: str | None = None  # id, of the latest run that made one
    last_error: str = ""  # of the latest run; empty: it made a snapshot


Idleness = Literal["disabled", "ineligible", "active", "idle_countdown", "ready_for_standby"]


class AutoStandbyStatus(Record, frozen=True, kw_only=True):
    """When an instance is put into standby automatically, and what keeps it awake.

    `disabled`: it has no such policy. `ineligible`: it does not run. `active`: it is in use, or has an open
    connection. `ready_for_standby`: its time is over, and a supervisor acts when it looks.
    """

    status: Idleness
    idle_timeout_s: float = 0.0  # 0: never
    in_use: bool = False  # a command, copy or connection goes through the agent now
    connections: int = 0  # TCP connections to its published ports that are open now
    last_active_at: float | None = None
    idle_since: float | None = None  # None: it is in use, or does not run
    standby_at: float | None = None  # None: nobody knows
    hold_until: float | None = None  # no automatic standby before this time
