"""Which instances the supervisor has to look at, and when."""

from __future__ import annotations

import functools
import sqlite3
import time
from typing import TYPE_CHECKING, Final

import msgspec

from coppice.completion import QuickCalls
from coppice.model import Observed, Record, State
from coppice.model.events import Kind
from coppice.state.database import Database

if TYPE_CHECKING:
    from coppice.state.schedules import Schedules

_PAGE: Final = 1000
_CLOCKS_S: Final = 5.0  # more than the times of a request and of a supervisor differ by
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Observed).decode


class Changes(Record, frozen=True, kw_only=True):
    """The instances that changed after an event."""

    last: int  # the newest event
    more: bool  # there are further events
    lost: bool  # older events are no longer kept: look at all instances
    supervised: frozenset[str]  # ids of those with policies
    others: frozenset[str]  # ids of those without, and of removed ones
    running: frozenset[str]  # ids of those that are Running now


class Supervised(QuickCalls):
    """All methods block; see `Database`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    @functools.cached_property
    def schedules(self) -> Schedules:
        """The snapshot schedules of instances."""
        from coppice.state.schedules import Schedules  # few processes need them

        return Schedules(self._db)

    def ids(self) -> set[str]:
        """Return the ids of all instances with policies."""
        with self._db.read() as connection:
            return {row[0] for row in connection.execute("SELECT id FROM instances WHERE supervised").fetchall()}

    def running(self) -> set[str]:
        """Return the ids of all Running instances."""
        with self._db.read() as connection:
            rows = connection.execute("SELECT id FROM instances WHERE state = ?", (State.RUNNING,)).fetchall()
        return {row[0] for row in rows}

    def expired(self, now: float) -> list[str]:
        """Return the ids of the instances whose lifetime is over, the earliest first."""
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT id FROM instances WHERE expires_at <= ? AND supervised ORDER BY expires_at", (now,)
            ).fetchall()
        return [row[0] for row in rows]

    def changes(self, after: int) -> Changes:
        """Return the instances that changed after an event, at most a page of events."""
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT events.id, events.instance, coalesce(instances.supervised, 0), instances.state FROM events "
                "LEFT JOIN instances ON instances.id = events.instance WHERE events.id > ? ORDER BY events.id LIMIT ?",
                (after, _PAGE),
            ).fetchall()
        return Changes(
            last=rows[-1][0] if rows else after,
            more=len(rows) == _PAGE,
            lost=bool(rows) and rows[0][0] > after + 1,
            supervised=frozenset(instance for _, instance, supervised, _ in rows if supervised),
            others=frozenset(instance for _, instance, supervised, _ in rows if not supervised),
            running=frozenset(instance for _, instance, _, state in rows if state == State.RUNNING),
        )

    def observed(self) -> dict[str, Observed]:
        """Return what was seen of all instances, by id."""
        with self._db.read() as connection:
            rows = connection.execute("SELECT instance, record FROM observations").fetchall()
        return {instance: _decode(record) for instance, record in rows}

    def observed_of(self, instance_id: str) -> Observed:
        """Return what was seen of one instance."""
        with self._db.read() as connection:
            row = connection.execute("SELECT record FROM observations WHERE instance = ?", (instance_id,)).fetchone()
        return _decode(row[0]) if row else Observed()

    def observe(self, instance_id: str, seen: Observed, kind: Kind | None = None, detail: str = "") -> None:
        """Record what was seen of an instance, and an event if `kind` is given. Do nothing for an
        instance that is gone.
        """
        with self._db.write() as connection:
            connection.execute(
                "INSERT INTO observations (instance, record) SELECT id, ?2 FROM instances WHERE id = ?1 "
                "ON CONFLICT (instance) DO UPDATE SET record = excluded.record",
                (instance_id, _encode(seen)),
            )
            if kind is not None:
                _tell(connection, instance_id, kind, detail)

    def hold(self, instance_id: str, now: float, until: float) -> None:
        """Record until when an instance is not put into standby. Do nothing for one that is gone.

        An event tells the supervisor of a hold that ends earlier than the one before: it would look too late.
        """
        with self._db.write() as connection:
            row = connection.execute(
                "SELECT hold_until FROM observations WHERE instance = ?", (instance_id,)
            ).fetchone()
            if row is not None and row[0] is not None and row[0] > until:
                _tell(connection, instance_id, "policies", "held")
            connection.execute(
                "INSERT INTO observations (instance, record, held_at, hold_until) "
                "SELECT id, ?2, ?3, ?4 FROM instances WHERE id = ?1 "
                "ON CONFLICT (instance) DO UPDATE SET held_at = excluded.held_at, hold_until = excluded.hold_until",
                (instance_id, _encode(Observed()), now, until),
            )

    def held_until(self, instance_id: str, now: float) -> float | None:
        """Return until when an instance is not put into standby. A hold of the future is from before the clock was
        set back, and does not count. One that came after `now` does, since a supervisor may have waited for a lock
        or a health check.
        """
        with self._db.read() as connection:
            row = connection.execute(
                "SELECT hold_until FROM observations WHERE instance = ?1 AND hold_until > ?2 AND held_at <= ?3",
                (instance_id, now, max(now, time.time()) + _CLOCKS_S),
            ).fetchone()
        return row[0] if row else None


def _tell(connection: sqlite3.Connection, instance_id: str, kind: Kind, detail: str) -> None:
    connection.execute(
        "INSERT INTO events (at, kind, instance, name, owner, state, parent, detail) "
        "SELECT ?2, ?3, id, name, json_extract(CAST(record AS TEXT), '$.owner'), state, parent, ?4 "
        "FROM instances WHERE id = ?1",
        (instance_id, time.time(), kind, detail),
    )
