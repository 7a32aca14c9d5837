"""Idempotency keys: the requests that clients may repeat, and their outcomes, in `server.db`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from coppice.completion import QuickCalls
from coppice.errors import KeyReused
from coppice.model import Record, to_json
from coppice.requests import Request
from coppice.server.failures import Failure
from coppice.state.database import Database
from coppice.vmm.process import own_process, start_ticks

KEPT_S: Final = 24 * 3600.0
"""Seconds for which a key and its outcome are kept."""
LARGEST_RESULT: Final = 8 << 20
"""Bytes of a result. A larger one, such as that of a command that writes much, is not kept."""
MOST_BYTES: Final = 512 << 20
"""Bytes of all large results. Beyond them, the oldest are not kept any longer."""
_LARGE: Final = 64 << 10
MOST_CHARACTERS: Final = 255
_DIGESTED: Final = msgspec.json.Encoder(order="deterministic")


class Claim(Record, frozen=True, kw_only=True):
    """What is recorded for a key.

    `status`: `new`, if this call recorded the key; `begun`, if a server began the operation and
    ended before it; `elsewhere`, if another server carries it out; else how the operation ended.
    """

    status: str
    begun_at: float
    generated: dict[str, Any]
    outcome: bytes | None = None


def digest_of(request: Request[Any]) -> str:
    """Return a digest of a request with all its values."""
    return hashlib.sha256(_DIGESTED.encode(request)).hexdigest()


class Keys(QuickCalls):
    """The keys of a data directory. All methods block for milliseconds."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._process = own_process()

    def claim(self, owner: str | None, key: str, request: Request[Any], generated: Mapping[str, Any]) -> Claim:
        """Record a key and the fields that the server generates for its request, or return what was
        recorded before.

        Values from the request are not recorded, since they may be secrets: who repeats the request
        sends them again.

        :raises KeyReused: the key was sent with another request
        """
        now, digest = time.time(), digest_of(request)
        with self._db.write() as connection:
            connection.execute("DELETE FROM keys WHERE begun_at < ?", (now - KEPT_S,))
            row = connection.execute(
                "SELECT digest, status, begun_at, generated, outcome, pid, ticks FROM keys WHERE owner = ? AND key = ?",
                (owner or "", key),
            ).fetchone()
            if row is None:
                connection.execute(
                    "INSERT INTO keys (owner, key, operation, digest, generated, begun_at, pid, ticks, status) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'begun')",
                    (owner or "", key, request.operation, digest, msgspec.json.encode(generated), now, *self._process),
                )
                return Claim(status="new", begun_at=now, generated=dict(generated))
            recorded, status, begun_at, names, outcome, pid, ticks = row
            if recorded != digest:
                raise key_reused(key)
            if status == "begun" and (pid, ticks) != self._process:
                if start_ticks(pid) == ticks:
                    status = "elsewhere"
                else:
                    connection.execute(
                        "UPDATE keys SET pid = ?, ticks = ? WHERE owner = ? AND key = ?",
                        (*self._process, owner or "", key),
                    )
        return Claim(status=status, begun_at=begun_at, generated=msgspec.json.decode(names), outcome=outcome)

    def succeeded(self, owner: str | None, key: str, result: object) -> None:
        """Record the result of an operation."""
        encoded = to_json(result)
        if len(encoded) > LARGEST_RESULT:
            self._end(owner, key, "too-large", None)
        else:
            self._end(owner, key, "succeeded", encoded)
        if _LARGE < len(encoded) <= LARGEST_RESULT:
            self._make_room()

    def _make_room(self) -> None:
        """Drop the oldest large results if all large results together exceed `MOST_BYTES`."""
        with self._db.write() as connection:
            connection.execute(
                "UPDATE keys SET status = 'too-large', outcome = NULL WHERE (owner, key) IN (SELECT owner, key FROM ("
                "SELECT owner, key, sum(length(outcome)) OVER (ORDER BY begun_at DESC, rowid DESC) AS later "
                "FROM keys WHERE length(outcome) > ?) WHERE later > ?)",
                (_LARGE, MOST_BYTES),
            )

    def failed(self, owner: str | None, key: str, failure: Failure) -> None:
        """Record the error of an operation."""
        self._end(owner, key, "failed", msgspec.json.encode(failure))

    def _end(self, owner: str | None, key: str, status: str, outcome: bytes | None) -> None:
        with self._db.write() as connection:
            connection.execute(
                "UPDATE keys SET status = ?, outcome = ? WHERE owner = ? AND key = ?",
                (status, outcome, owner or "", key),
            )

    def has_content(self, owner: str | None, key: str, sha256: str, *, first: bool) -> bool:
        """Record the digest of the body that came with a key, if it is the `first`. Else return whether it equals
        the first one, as far as that is known: a killed server did not record it.
        """
        with self._db.write() as connection:
            if first:
                connection.execute(
                    "UPDATE keys SET content = ? WHERE owner = ? AND key = ?", (sha256, owner or "", key)
                )
            row = connection.execute(
                "SELECT content FROM keys WHERE owner = ? AND key = ?", (owner or "", key)
            ).fetchone()
        return row is None or row[0] in (None, sha256)

    def forget(self, owner: str | None, key: str) -> None:
        """Forget a key whose operation had no effect, so that the same request can be sent again."""
        with self._db.write() as connection:
            connection.execute("DELETE FROM keys WHERE owner = ? AND key = ?", (owner or "", key))


def key_reused(key: str) -> KeyReused:
    """Return the error for a key of two different requests."""
    return KeyReused(
        f"the idempotency key {key[:80]!r} was sent before with another request",
        hint="send a new key with a new request",
    )
