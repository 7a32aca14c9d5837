"""What the supervisor does with an instance, in the hypeman API: automatic standbys and snapshot schedules."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Final, Literal

from litestar import delete, get, post, put
from litestar.params import FromPath, JSONBody
from msgspec import UNSET, UnsetType

from coppice.model import Record, automation
from coppice.requests import (
    AutoStandbyHoldRequest,
    AutoStandbyRequest,
    SnapshotScheduleRequest,
    SnapshotScheduleRmRequest,
    SnapshotScheduleSetRequest,
)
from coppice.server.context import TheCaller, TheServer
from coppice.server.hypeman.instances import READ, TAGS, WRITE
from coppice.server.hypeman.paths import find, go_duration, moment, moment_if, seconds

Reason = Literal[
    "policy_missing",
    "instance_not_running",
    "active_inbound_connections",
    "idle_timeout_not_elapsed",
    "ready_for_standby",
]
_SCHEDULES: Final = ["snapshots"]
_REASONS: Final[dict[str, Reason]] = {
    "disabled": "policy_missing",
    "ineligible": "instance_not_running",
    "active": "active_inbound_connections",
    "idle_countdown": "idle_timeout_not_elapsed",
    "ready_for_standby": "ready_for_standby",
}


class AutoStandbyStatus(Record, frozen=True, kw_only=True):
    """When an instance is put into standby. A command or copy in it counts as `active_inbound_connections` too."""

    supported: bool = True
    configured: bool
    enabled: bool
    eligible: bool
    status: automation.Idleness
    reason: Reason
    tracking_mode: str = "sessions-and-published-ports"
    active_inbound_connections: int
    idle_timeout: str | UnsetType = UNSET
    idle_since: datetime | UnsetType = UNSET
    last_inbound_activity_at: datetime | UnsetType = UNSET
    next_standby_at: datetime | UnsetType = UNSET
    countdown_remaining: str | UnsetType = UNSET
    hold_until: datetime | UnsetType = UNSET


def _status_of(found: automation.AutoStandbyStatus) -> AutoStandbyStatus:
    enabled, due = found.status != "disabled", found.standby_at
    return AutoStandbyStatus(
        configured=enabled,
        enabled=enabled,
        eligible=found.status not in ("disabled", "ineligible"),
        status=found.status,
        reason=_REASONS[found.status],
        active_inbound_connections=found.connections,
        idle_timeout=go_duration(found.idle_timeout_s) if enabled else UNSET,
        idle_since=moment_if(found.idle_since),
        last_inbound_activity_at=moment_if(found.last_active_at),
        next_standby_at=moment_if(due),
        countdown_remaining=go_duration(max(due - time.time(), 0.0)) if due is not None else UNSET,
        hold_until=moment_if(found.hold_until),
    )


@get("/instances/{key:str}/auto-standby/status", summary="When it is put into standby.", tags=TAGS, opt=READ)
async def auto_standby_status(key: FromPath[str], server: TheServer, caller: TheCaller) -> AutoStandbyStatus:
    """Say when an idle instance is put into standby, and what keeps it awake."""
    host = await server.host(caller)
    found = await find(host, key)
    return _status_of(await host.call(AutoStandbyRequest(instance=found.id)))


@post(
    "/instances/{key:str}/auto-standby/hold",
    summary="Hold off an automatic standby.",
    tags=TAGS,
    status_code=200,
    opt=WRITE,
)
async def auto_standby_hold(key: FromPath[str], server: TheServer, caller: TheCaller) -> AutoStandbyStatus:
    """Keep an instance awake for its idle time, from now on. Refused (409 `instance_in_standby`) if it rests."""
    found = await find(await server.host(caller), key)
    return _status_of(await server.carry_out(caller, AutoStandbyHoldRequest(instance=found.id)))


class Retention(Record, frozen=True, kw_only=True):
    """Which snapshots of a schedule are kept. One of the two limits is needed."""

    max_count: int | None = None
    max_age: str | None = None


class ScheduleSet(Record, frozen=True, kw_only=True):
    """A request for a snapshot schedule."""

    interval: str
    retention: Retention
    name_prefix: str | None = None
    metadata: dict[str, str] = {}


class Kept(Record, frozen=True, kw_only=True):
    """Which snapshots of a schedule are kept."""

    max_count: int | UnsetType = UNSET
    max_age: str | UnsetType = UNSET


class Schedule(Record, frozen=True, kw_only=True):
    """The snapshot schedule of an instance."""

    instance_id: str
    interval: str
    retention: Kept
    created_at: datetime
    updated_at: datetime
    next_run_at: datetime
    name_prefix: str | UnsetType = UNSET
    metadata: dict[str, str]
    last_run_at: datetime | UnsetType = UNSET
    last_snapshot_id: str | UnsetType = UNSET
    last_error: str | UnsetType = UNSET


def _schedule_of(found: automation.SnapshotSchedule) -> Schedule:
    return Schedule(
        instance_id=found.instance,
        interval=go_duration(found.interval_s),
        retention=Kept(
            max_count=found.max_count or UNSET,
            max_age=go_duration(found.max_age_s) if found.max_age_s else UNSET,
        ),
        created_at=moment(found.created_at),
        updated_at=moment(found.updated_at),
        next_run_at=moment(found.next_run_at),
        name_prefix=found.name_prefix or UNSET,
        metadata=found.tags,
        last_run_at=moment_if(found.last_run_at),
        last_snapshot_id=found.last_snapshot or UNSET,
        last_error=found.last_error or UNSET,
    )


@get(
    "/instances/{key:str}/snapshot-schedule",
    summary="Get a snapshot schedule.",
    tags=_SCHEDULES,
    opt={"scope": "snapshot:read"},
)
async def schedule_get(key: FromPath[str], server: TheServer, caller: TheCaller) -> Schedule:
    """Return the snapshot schedule of an instance, with what became of its latest run."""
    host = await server.host(caller)
    found = await find(host, key)
    return _schedule_of(await host.call(SnapshotScheduleRequest(instance=found.id)))


@put(
    "/instances/{key:str}/snapshot-schedule",
    summary="Set a snapshot schedule.",
    tags=_SCHEDULES,
    opt={"scope": "snapshot:write"},
)
async def schedule_set(
    key: FromPath[str], data: JSONBody[ScheduleSet], server: TheServer, caller: TheCaller
) -> Schedule:
    """Take snapshots of an instance at an interval, and remove old ones. This replaces its schedule."""
    found = await find(await server.host(caller), key)
    age = data.retention.max_age
    request = SnapshotScheduleSetRequest(
        instance=found.id,
        interval_s=seconds(data.interval),
        max_count=data.retention.max_count,
        max_age_s=None if age is None else seconds(age),
        name_prefix=data.name_prefix,
        tags=data.metadata,
    )
    return _schedule_of(await server.carry_out(caller, request))


@delete(
    "/instances/{key:str}/snapshot-schedule",
    summary="Remove a snapshot schedule.",
    tags=_SCHEDULES,
    opt={"scope": "snapshot:delete"},
)
async def schedule_delete(key: FromPath[str], server: TheServer, caller: TheCaller) -> None:
    """Take no further scheduled snapshots. Those that exist stay."""
    found = await find(await server.host(caller), key)
    await server.carry_out(caller, SnapshotScheduleRmRequest(instance=found.id))


ROUTES: Final = [auto_standby_status, auto_standby_hold, schedule_get, schedule_set, schedule_delete]
