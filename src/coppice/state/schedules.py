"""The snapshot schedules of instances."""

from __future__ import annotations

from typing import Final

import msgspec

from coppice.completion import QuickCalls
from coppice.model.automation import SnapshotSchedule
from coppice.model.ownership import no_instance
from coppice.state.database import Database

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(SnapshotSchedule).decode
# An instance has the owner of its snapshots, which may outlive it.
_OWN: Final = """(?2 IS NULL OR NOT EXISTS (
    SELECT 1 FROM instances WHERE id = schedules.instance AND json_extract(CAST(record AS TEXT), '$.owner') IS NOT ?2
    UNION ALL
    SELECT 1 FROM snapshots WHERE source = schedules.instance AND json_extract(CAST(record AS TEXT), '$.owner') IS NOT ?2
))"""


class Schedules(QuickCalls):
    """All methods block; see `Database`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def get(self, instance_id: str) -> SnapshotSchedule | None:
        """Return the schedule of an instance, which may be gone."""
        with self._db.read() as connection:
            row = connection.execute("SELECT record FROM schedules WHERE instance = ?", (instance_id,)).fetchone()
        return _decode(row[0]) if row else None

    def put(self, wanted: SnapshotSchedule) -> SnapshotSchedule:
        """Record the schedule of an instance, and return it.

        One that was there before keeps its runs, and with the same interval also the time of the next one.

        :raises NotFound: the instance is gone
        """
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM schedules WHERE instance = ?", (wanted.instance,)).fetchone()
            if row is not None:
                before = _decode(row[0])
                wanted = msgspec.structs.replace(
                    wanted,
                    created_at=before.created_at,
                    next_run_at=before.next_run_at if before.interval_s == wanted.interval_s else wanted.next_run_at,
                    last_run_at=before.last_run_at,
                    last_snapshot=before.last_snapshot,
                    last_error=before.last_error,
                )
            done = connection.execute(
                "INSERT OR REPLACE INTO schedules (instance, due, longest, record) "
                "SELECT id, ?2, ?3, ?4 FROM instances WHERE id = ?1",
                (
                    wanted.instance,
                    wanted.updated_at,
                    _longest(wanted),
                    _encode(wanted),
                ),  # the snapshots may be too many
            )
            if done.rowcount == 0:
                raise no_instance(wanted.instance)
        return wanted

    def remove(self, instance_id: str) -> bool:
        """Remove the schedule of an instance. Return whether there was one."""
        with self._db.write() as connection:
            return connection.execute("DELETE FROM schedules WHERE instance = ?", (instance_id,)).rowcount > 0

    def due(self, now: float, owner: str | None) -> tuple[list[str], float | None]:
        """Return the instances whose schedules are to be looked at now, and the time of the next one.

        :param owner: leave out the schedules of other owners; None: of none
        """
        with self._db.read() as connection:
            rows = connection.execute(
                f"SELECT instance FROM schedules WHERE (due <= ?1 OR due > ?1 + longest) AND {_OWN} ORDER BY due",  # noqa: S608 - a constant
                (now, owner),
            ).fetchall()
            following = connection.execute(
                f"SELECT min(due) FROM schedules WHERE due > ?1 AND {_OWN}",  # noqa: S608 - a constant
                (now, owner),
            ).fetchone()
        return [row[0] for row in rows], following[0]

    def begin(self, seen: SnapshotSchedule, now: float) -> SnapshotSchedule | None:
        """Record that a run begins, before its snapshot is made: a killed process repeats none. Return the
        schedule with the time of its next run; None if it was removed, changed, or begun by another supervisor since
        it was `seen`.

        The times keep their rhythm. Runs that were missed are left out.
        """
        instance_id = seen.instance
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM schedules WHERE instance = ?", (instance_id,)).fetchone()
            if row is None:
                return None
            found = _decode(row[0])
            if found.next_run_at != seen.next_run_at:
                return None
            missed = max(now - found.next_run_at, 0.0) // found.interval_s
            following = min(found.next_run_at + (missed + 1) * found.interval_s, now + found.interval_s)
            begun = msgspec.structs.replace(found, last_run_at=now, next_run_at=following)
            connection.execute("UPDATE schedules SET record = ? WHERE instance = ?", (_encode(begun), instance_id))
        return begun

    def ran(self, instance_id: str, snapshot: str | None, error: str) -> None:
        """Record the outcome of a run."""
        with self._db.write() as connection:
            row = connection.execute("SELECT record FROM schedules WHERE instance = ?", (instance_id,)).fetchone()
            if row is not None:
                found = _decode(row[0])
                ended = msgspec.structs.replace(found, last_snapshot=snapshot or found.last_snapshot, last_error=error)
                connection.execute("UPDATE schedules SET record = ? WHERE instance = ?", (_encode(ended), instance_id))

    def look_again(self, seen: SnapshotSchedule, at: float) -> None:
        """Record when to look at a schedule next, unless it has been changed since it was `seen`."""
        with self._db.write() as connection:
            connection.execute(
                "UPDATE schedules SET due = ?2 WHERE instance = ?1 "
                "AND json_extract(CAST(record AS TEXT), '$.updated_at') = ?3",
                (seen.instance, at, seen.updated_at),
            )


def _longest(schedule: SnapshotSchedule) -> float:
    return max(schedule.interval_s, schedule.max_age_s)
