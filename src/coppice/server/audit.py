"""The audit log: who did what, in `server.db`.

An entry has no payload, no argument of a command and no error message, since these may hold
secrets. Entries are written in groups by one task, so that no request waits for it. The end of an
operation is written a moment later, so that it does not delay the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from coppice.completion import QuickCalls, complete, in_thread
from coppice.errors import CoppiceError
from coppice.model import Record
from coppice.names import new_id
from coppice.requests import Request
from coppice.server.auth import Caller
from coppice.server.failures import code_of
from coppice.state.database import Database

MOST_ENTRIES: Final = 100_000
"""Older entries are removed."""
_TARGETS: Final = ("instance", "snapshot", "volume", "name", "image", "kernel", "reference")
_LONGEST: Final = 255  # characters of a target
_ENDS_S: Final = 0.2  # from the end of an operation to its entry
_log = logging.getLogger(__name__)


class Entry(Record, frozen=True, kw_only=True):
    """One operation of one caller."""

    id: str
    at: float
    request_id: str
    client: str  # its address; empty on a unix socket
    subject: str | None  # of the token; None: the operator
    owner: str | None  # whose records the operation uses; None: those of all owners
    operation: str
    target: str | None  # the object that the request names
    outcome: str = "begun"  # `succeeded`, `cancelled`, or the code of the error
    seconds: float | None = None


class _Table(QuickCalls):
    """The table of a data directory. All methods block for milliseconds."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def write(self, entries: list[Entry]) -> None:
        """Insert entries, or replace those that were written before."""
        rows = [(each.id, each.owner or "", msgspec.json.encode(each)) for each in entries]
        with self._db.write() as connection:
            connection.executemany(
                "INSERT INTO audit (id, owner, entry) VALUES (?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET entry = excluded.entry",
                rows,
            )
            connection.execute("DELETE FROM audit WHERE number <= (SELECT max(number) FROM audit) - ?", (MOST_ENTRIES,))

    def newest(self, owner: str | None, limit: int) -> list[Entry]:
        """Return the newest entries of an owner; None: of all."""
        with self._db.read() as connection:
            rows = connection.execute(
                "SELECT entry FROM audit WHERE ?1 IS NULL OR owner = ?1 ORDER BY number DESC LIMIT ?2", (owner, limit)
            ).fetchall()
        return [msgspec.json.decode(row[0], type=Entry) for row in rows]


class Audit:
    """The log of one server. It is opened before the first request."""

    def __init__(self) -> None:
        self._opened: _Table | None = None
        self._waiting: dict[str, Entry] = {}
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def open(self, database: Database) -> None:
        """Use an open database."""
        self._opened = _Table(database)

    @contextlib.contextmanager
    def recorded(self, caller: Caller, owner: str | None, operation: str, target: str | None) -> Iterator[None]:
        """Record the operation of a block, when it begins and when it ends."""
        entry = _entry(caller, owner, operation, target)
        self._put(entry)
        outcome = "succeeded"
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            outcome = code_of(error)
            raise
        finally:
            ended = msgspec.structs.replace(entry, outcome=outcome, seconds=round(time.time() - entry.at, 4))
            self._waiting[entry.id] = ended
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_ENDS_S, self._begin)

    def refused(self, caller: Caller, operation: str, error: Exception) -> None:
        """Record a request that its caller may not make."""
        entry = _entry(caller, caller.owner, operation, None)
        self._put(msgspec.structs.replace(entry, outcome=code_of(error), seconds=0.0))

    def _put(self, entry: Entry) -> None:
        self._waiting[entry.id] = entry
        self._begin()

    def _begin(self) -> None:
        """Begin to write what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="audit")

    async def _write(self) -> None:
        while self._waiting and self._opened is not None:
            entries, self._waiting = list(self._waiting.values()), {}
            try:
                await complete(in_thread(self._opened.write, entries))
            except CoppiceError as error:
                _log.error("%d entries of the audit log are lost: %s", len(entries), error)

    async def written(self) -> None:
        """Write what waits. Return when all entries are in the database."""
        self._begin()
        while self._writing is not None and not self._writing.done():
            await asyncio.wait({self._writing})

    async def newest(self, owner: str | None, limit: int) -> list[Entry]:
        """Return the newest entries of an owner, newest first; None: of all owners."""
        if self._opened is None:
            return []
        await self.written()
        return await in_thread(self._opened.newest, owner, limit)


def target_of(request: Request[Any]) -> str | None:
    """Return what a request names as its target."""
    named = (getattr(request, name, None) for name in _TARGETS)
    return next((each[:_LONGEST] for each in named if isinstance(each, str)), None)


def _entry(caller: Caller, owner: str | None, operation: str, target: str | None) -> Entry:
    return Entry(
        id=new_id(),
        at=time.time(),
        request_id=caller.request_id,
        client=caller.client,
        subject=caller.owner,
        owner=owner,
        operation=operation,
        target=target,
    )
